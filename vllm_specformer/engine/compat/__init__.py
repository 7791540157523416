"""Which vLLM this package runs on, and every symbol of it that the package relies on."""
