"""The table of vLLM's features beside speculation, its trials and its recorded outcomes."""
