"""SpecFormer for vLLM: a draft head that proposes K tokens in one pass, always losslessly."""

__version__ = "0.2.0"
