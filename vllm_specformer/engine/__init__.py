"""Everything that touches vLLM internals. Nothing outside this folder imports them."""
