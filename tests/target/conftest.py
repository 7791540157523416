"""A toy target with random weights, in float64."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from support.toy_target import make_toy_target


@pytest.fixture
def target_model() -> PreTrainedModel:
    return make_toy_target()
