"""Prompts and distilled answers on disk. Knows neither vLLM nor training."""
