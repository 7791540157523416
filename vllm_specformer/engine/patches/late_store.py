"""The output of a step that drafts nothing leaves before the head's K/V are stored (CPU, V1).

A step at K = 0 never reads this K/V, so the store is deferred until its output is sent. On a CPU
the worker is a process of its own, which has nothing to do until the engine has read the output and
laid out the next step: about as long as storing takes. The next step that drafts finds everything
stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_specformer.engine.patches.ledger import patch

if TYPE_CHECKING:
    from torch import Tensor

# Hooked states [T, G*H], positions [T] and slots [T] of one step.
DeferredRows: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


def has_time_between_steps(vllm_config: Any) -> bool:
    """Whether this worker waits for its engine between steps, and nothing but the head would read.

    Ranks of one target would have to store at the same time, because they add up their shares. A
    connector sends the pages of a step away at the step's end.
    """
    parallel = vllm_config.parallel_config
    return (
        parallel.distributed_executor_backend == "mp"
        and parallel.world_size == 1
        and not vllm_config.scheduler_config.async_scheduling
        and vllm_config.kv_transfer_config is None
    )


@patch(
    "vllm.v1.executor.multiproc_executor:WorkerProc.handle_output",
    why="after a step that drafts nothing nobody waits while the head's K/V are stored",
    guard="stores what the CPU's SpecFormer proposer has left, and does nothing in any other "
    "worker; the next step stores it where this is not called",
)
def handle_output(original: Callable[..., None], self: Any, output: Any) -> None:
    original(self, output)
    # Not every worker drafts, and none of them before it is loaded.
    runner = getattr(self.worker.worker, "model_runner", None)
    store = getattr(getattr(runner, "drafter", None), "store_what_is_left", None)
    if store is not None:
        store()
