"""SpecFormer's operations: one folder per op, a Triton kernel beside its PyTorch reference.

Import an op from its folder: `from specformer_kernels.block_attention import block_attention`.
Nothing here knows vLLM, and importing needs neither a GPU nor Triton.
"""
