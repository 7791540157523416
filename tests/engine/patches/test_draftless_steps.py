"""A step without drafts loses its layout for verification; every other step keeps it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from vllm_specformer.engine.patches.draftless_steps import execute_model
from vllm_specformer.names import ARCHITECTURE

OURS = SimpleNamespace(
    draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]))
)


class State(NamedTuple):
    spec_decode_metadata: Any


def run(drafts: list[int] | None, speculative: Any = OURS, is_async: bool = False) -> Any:
    """The layout that is left after a step with these numbers of drafts; None: it had none."""
    layout = None if drafts is None else SimpleNamespace(num_draft_tokens=drafts)

    def original(runner: Any, order: str) -> str:
        runner.execute_model_state = State(layout)
        return order

    runner = SimpleNamespace(use_async_scheduling=is_async, speculative_config=speculative)
    assert execute_model(original, runner, "output") == "output"
    return runner.execute_model_state.spec_decode_metadata


def test_a_step_without_drafts_is_sampled_plainly() -> None:
    assert run([0, 0]) is None
    assert run(None) is None


@pytest.mark.parametrize(
    ("drafts", "speculative", "is_async"),
    [([0, 1], OURS, False), ([0], None, False), ([0], OURS, True)],
    ids=["drafts", "another method", "asynchronous"],
)
def test_every_other_step_keeps_its_layout(
    drafts: list[int], speculative: Any, is_async: bool
) -> None:
    assert run(drafts, speculative, is_async).num_draft_tokens == drafts


def test_a_step_of_no_request_is_left_alone() -> None:
    runner = SimpleNamespace(execute_model_state=None)
    assert execute_model(lambda self: None, runner) is None
