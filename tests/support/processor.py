"""What this processor lacks of what vLLM's CPU build wants, with or without speculation."""

from __future__ import annotations

import pytest
import torch

HAS_AVX512 = bool(torch.cpu.get_capabilities().get("avx512_f"))
# With it vLLM's products at W8A8 take 16-bit activations only.
HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_int8"))
# vLLM says so itself: "FP8 KV cache on CPU requires x86 with AVX-512 or AMX".
wants_fp8_cache = pytest.mark.skipif(
    not HAS_AVX512, reason="vLLM's FP8 KV cache on a CPU wants AVX-512"
)
