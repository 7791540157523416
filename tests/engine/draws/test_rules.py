"""Which drafts are the default, and which requests get the best ones all the same."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from support.configs import asking, configured
from support.paths import HEAD
from vllm_specformer.engine.draws.rules import NARROW_TOP_K, NARROW_TOP_P, wants_best

SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({}, "probabilistic"),
        ({"draft_sample_method": None}, "probabilistic"),
        ({"draft_sample_method": "greedy"}, "greedy"),
        ({"draft_sample_method": "probabilistic"}, "probabilistic"),
        ({"verification": "coupled"}, "probabilistic"),
        ({"verification": "coupled", "draft_sample_method": "greedy"}, "greedy"),
        ({"draft_confidence_threshold": 0.4}, "probabilistic"),
        (SYNTHETIC, "greedy"),
        (SYNTHETIC | {"draft_sample_method": "probabilistic"}, "probabilistic"),
    ],
)
def test_the_default(more: dict[str, Any], method: str) -> None:
    config = configured(asking(HEAD, **more)).speculative_config
    assert config is not None
    assert config.draft_sample_method == method


@pytest.mark.parametrize(
    ("fields", "best"),
    [
        ({"temperature": 1.0}, False),
        ({"temperature": 0.3, "top_p": 0.95, "top_k": 20, "seed": 7}, False),
        ({"temperature": 1.0, "top_p": NARROW_TOP_P}, False),
        ({"temperature": 1.0, "top_p": NARROW_TOP_P - 0.01}, True),
        ({"temperature": 1.0, "top_k": 1}, True),
        ({"temperature": 1.0, "top_k": NARROW_TOP_K}, True),
        ({"temperature": 1.0, "top_k": NARROW_TOP_K + 1}, False),
        ({"temperature": 1.0, "top_k": 0}, False),  # all tokens
        ({"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="a+")}, True),
        # Greedy requests get the best tokens on any path.
        ({"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="a+")}, False),
        ({"temperature": 0.0}, False),
    ],
)
def test_requests_that_want_the_best_tokens(fields: dict[str, Any], best: bool) -> None:
    assert wants_best(SamplingParams(**fields)) is best


def test_pooling_requests_have_no_drafts() -> None:
    assert not wants_best(None)
