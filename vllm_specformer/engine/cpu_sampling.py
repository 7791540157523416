"""Two repairs of vLLM's CPU build, without which sampling under speculation fails there.

Both defects are in vLLM 0.32 and 0.33, with every speculative method; its GPU kernels are not
concerned.

`_expand_kernel_impl`, which spreads a request's temperature, top-k and top-p over its draft rows,
hands the C++ kernel an int64 COPY of the result tensor, so nothing arrives in a float or int32 one.
The rejection sampler then divides logits by uninitialised memory, and greedy requests that share a
batch with sampled ones suffer as well.

`apply_top_k_only` takes the maximum of an empty tensor in a step without any draft rows, such as
the first one of a request: a request with top-k and without top-p ends the engine.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import Tensor


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,  # noqa: N803
) -> None:
    """Repeat `input_val[i]` for each of request i's rows of `output`, with one value replaced.

    Takes the place of `vllm.utils.cpu_triton_utils._expand_kernel_impl`, parameters as there;
    `cu_num_tokens` [R] are the running sums of rows per request.
    """
    rows = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = input_val.masked_fill(input_val == replace_from, replace_to)
    output.copy_(values.repeat_interleave(rows))


def repair_expand(module: ModuleType) -> None:
    """Put `expand` into `vllm.utils.cpu_triton_utils`, before the CPU platform registers it."""
    if hasattr(module, "_expand_kernel_impl"):
        vars(module)["_expand_kernel_impl"] = expand


def repair_top_k(module: ModuleType) -> None:
    """Let `apply_top_k_only` of `vllm.v1.sample.ops.topk_topp_sampler` accept no rows at all."""
    original = getattr(module, "apply_top_k_only", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return original(logits, k) if len(logits) else logits

    vars(module)["apply_top_k_only"] = apply_top_k_only
