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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_specformer.engine.patches.ledger import patch

if TYPE_CHECKING:
    from torch import Generator, Tensor


@patch(
    "vllm.utils.cpu_triton_utils:_expand_kernel_impl",
    why="on the CPU build it discards its result, so with any speculation temperature, top-k and "
    "top-p were uninitialised memory",
    guard="the CPU build alone imports that module; does what the kernel it replaces is to do",
)
def _expand_kernel_impl(
    original: Callable[..., None],
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,  # noqa: N803
) -> None:
    """Repeat `input_val[i]` for each of request i's rows of `output`, with one value replaced.

    `cu_num_tokens` [R] are the running sums of rows per request.
    """
    rows = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = input_val.masked_fill(input_val == replace_from, replace_to)
    output.copy_(values.repeat_interleave(rows))


@patch(
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
    why="a step without draft rows ends the engine when a request sets top-k on the CPU build, "
    "with any speculation",
    guard="acts on empty logits only, which the original cannot take",
)
def apply_top_k_only(original: Callable[..., Tensor], logits: Tensor, k: Tensor) -> Tensor:
    return original(logits, k) if len(logits) else logits


@patch(
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._sample",
    why="a seeded request whose prompt takes two steps ends the engine on the CPU build, with or "
    "without speculation: puts its generator back after sampling",
    guard="the CPU's runner alone; acts on rows whose sample is thrown away",
)
def _sample(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    states = {generator: generator.get_state() for _, generator in _discarded(self)}
    result = original(self, *args, **kwargs)
    for generator, state in states.items():
        generator.set_state(state)
    return result


@patch(
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner._bookkeeping_sync",
    why="the same defect: hides such generators where vLLM moves their offset, which ends the "
    "engine",
    guard="the CPU's runner alone; acts on rows whose sample is thrown away",
)
def _bookkeeping_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    generators, hidden = self.input_batch.generators, dict(_discarded(self))
    for row in hidden:
        del generators[row]
    try:
        return original(self, *args, **kwargs)
    finally:
        generators.update(hidden)


def _discarded(runner: Any) -> list[tuple[int, Generator]]:
    """Rows whose sample will be thrown away, with their generators."""
    generators = runner.input_batch.generators
    rows = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    return [(int(row), generators[int(row)]) for row in rows if int(row) in generators]
