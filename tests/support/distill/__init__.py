"""For tests of `specformer distill`: stand-ins for engine and server, and runs that are killed."""
