"""Three repairs of vLLM's CPU build, without which sampling fails there.

The defects are in vLLM 0.32 and 0.33; its GPU kernels are not concerned. The first two come with
every speculative method, the third without any, too.

`_expand_kernel_impl`, which spreads a request's temperature, top-k and top-p over its draft rows,
hands the C++ kernel an int64 COPY of the result tensor, so nothing arrives in a float or int32 one.
The rejection sampler then divides logits by uninitialised memory, and greedy requests that share a
batch with sampled ones suffer as well.

`apply_top_k_only` takes the maximum of an empty tensor in a step without any draft rows, such as
the first one of a request: a request with top-k and without top-p ends the engine.

`_bookkeeping_sync` takes back the noise of rows whose sample is thrown away, those of a prompt that
is not yet computed to its end, by moving their generator's offset. A CPU generator has none: a
request with a seed and a prompt computed in two steps ends the engine.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vllm_specformer.engine.patches.cpu_synthetic import repair_synthetic


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


def repair_kernels(module: ModuleType) -> None:
    """Mend the kernels of `vllm.utils.cpu_triton_utils` before the CPU platform registers them."""
    if hasattr(module, "_expand_kernel_impl"):
        vars(module)["_expand_kernel_impl"] = expand
    repair_synthetic(module)


def repair_top_k(module: ModuleType) -> None:
    """Let `apply_top_k_only` of `vllm.v1.sample.ops.topk_topp_sampler` accept no rows at all."""
    original = getattr(module, "apply_top_k_only", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return original(logits, k) if len(logits) else logits

    vars(module)["apply_top_k_only"] = apply_top_k_only


def repair_generators(module: ModuleType) -> None:
    """Let `CPUModelRunner` of `vllm.v1.worker.cpu_model_runner` take noise back, by state."""
    runner = getattr(module, "CPUModelRunner", None)
    if runner is None or "_bookkeeping_sync" in vars(runner):
        return
    sample, bookkeep = runner._sample, runner._bookkeeping_sync

    @functools.wraps(sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = {generator: generator.get_state() for _, generator in _discarded(self)}
        result = sample(self, *args, **kwargs)
        for generator, state in states.items():
            generator.set_state(state)
        return result

    @functools.wraps(bookkeep)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators, hidden = self.input_batch.generators, dict(_discarded(self))
        for row in hidden:
            del generators[row]
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync


def _discarded(runner: Any) -> list[tuple[int, torch.Generator]]:
    """Rows whose sample will be thrown away, with their generators."""
    generators = runner.input_batch.generators
    rows = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    return [(int(row), generators[int(row)]) for row in rows if int(row) in generators]
