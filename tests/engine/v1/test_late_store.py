"""On a CPU the K/V of a step that drafts nothing are stored once the step's output has left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specformer.engine.patches.late_store import has_time_between_steps, store_when_sent


def worker_of(model_runner: Any, done: list[str]) -> Any:
    """A patched worker process; `done` tells what it did."""

    class WorkerProc:
        def __init__(self) -> None:
            self.worker = SimpleNamespace(worker=SimpleNamespace(model_runner=model_runner))

        def handle_output(self, output: Any) -> None:
            done.append(f"sent {output}")

    for _ in range(2):  # the second time changes nothing
        store_when_sent(SimpleNamespace(WorkerProc=WorkerProc))  # type: ignore[arg-type]
    return WorkerProc()


def test_the_output_leaves_first() -> None:
    done: list[str] = []
    drafter = SimpleNamespace(store_what_is_left=lambda: done.append("stored"))
    worker_of(SimpleNamespace(drafter=drafter), done).handle_output("tokens")
    assert done == ["sent tokens", "stored"]


@pytest.mark.parametrize("runner", [None, SimpleNamespace(), SimpleNamespace(drafter=object())])
def test_other_workers_only_send(runner: Any) -> None:
    done: list[str] = []
    worker_of(runner, done).handle_output("tokens")
    assert done == ["sent tokens"]


def config(**changes: Any) -> Any:
    given = {"backend": "mp", "ranks": 1, "asynchronous": False, "connector": None, **changes}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            distributed_executor_backend=given["backend"], world_size=given["ranks"]
        ),
        scheduler_config=SimpleNamespace(async_scheduling=given["asynchronous"]),
        kv_transfer_config=given["connector"],
    )


def test_a_worker_without_time_stores_at_once() -> None:
    assert has_time_between_steps(config())
    for change in ({"backend": "uni"}, {"ranks": 2}, {"asynchronous": True}, {"connector": "x"}):
        assert not has_time_between_steps(config(**change))
