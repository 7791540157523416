"""The target: its files, its model in Transformers, and the hidden states a head is hooked to."""
