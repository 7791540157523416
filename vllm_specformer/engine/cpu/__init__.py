"""What the head runs on a CPU in place of its Triton kernels."""
