"""On a CPU the K/V of a step that drafts nothing are stored once the step's output has left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specformer.engine.patches.late_store import handle_output, has_time_between_steps


def send(model_runner: Any, done: list[str]) -> None:
    """Let a patched worker process send an output; `done` tells what it did."""
    worker = SimpleNamespace(
        worker=SimpleNamespace(worker=SimpleNamespace(model_runner=model_runner))
    )
    handle_output(lambda self, output: done.append(f"sent {output}"), worker, "tokens")


def test_the_output_leaves_first() -> None:
    done: list[str] = []
    drafter = SimpleNamespace(store_what_is_left=lambda: done.append("stored"))
    send(SimpleNamespace(drafter=drafter), done)
    assert done == ["sent tokens", "stored"]


@pytest.mark.parametrize("runner", [None, SimpleNamespace(), SimpleNamespace(drafter=object())])
def test_other_workers_only_send(runner: Any) -> None:
    done: list[str] = []
    send(runner, done)
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
