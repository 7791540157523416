"""A server of our own making: `vllm serve` as a child process. Imports no vLLM."""
