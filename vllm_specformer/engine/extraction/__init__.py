"""Hidden states of a target that vLLM runs, for training: vLLM's own method, written to files."""
