"""For tests on vLLM's V2 runner, which runs here in Triton's interpreter."""
