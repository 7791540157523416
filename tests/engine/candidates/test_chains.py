"""Which requests get chains because a row's logits hang on the rows before it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_specformer.engine.candidates.chains import depends_on_rows_before, has_other_processors


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"bad_words": ["x"]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"thinking_token_budget": 10},
    ],
)
def test_rows_before_matter(changes: dict[str, Any]) -> None:
    assert depends_on_rows_before(SamplingParams(**changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0}, {"top_p": 0.5, "top_k": 3}, {"min_tokens": 4}, {"logprobs": 2}],
)
def test_rows_before_make_no_difference(changes: dict[str, Any]) -> None:
    assert not depends_on_rows_before(SamplingParams(**changes))


def test_pooling_requests_have_no_drafts() -> None:
    assert not depends_on_rows_before(None)


def test_processors_of_packages_are_seen() -> None:
    built_in = type("Own", (), {"__module__": "vllm.v1.worker.gpu.sample.penalties"})()
    plugin = type("Plugin", (), {"__module__": "some_package"})()
    assert not has_other_processors(SimpleNamespace(logits_processors=[built_in]))
    assert has_other_processors(SimpleNamespace(logits_processors=[built_in, plugin]))
