"""Whatever a speculative config holds: an engine configuration, or one message for people."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from support.paths import HEAD, TARGET
from vllm_specformer.config import read_head_config
from vllm_specformer.engine.speculative_config import CONFIDENCE, SCHEDULE
from vllm_specformer.errors import SpecFormerError, SpeculativeConfigError

SLOTS = read_head_config(HEAD).num_draft_slots
GOOD: dict[str, Any] = {
    "method": "specformer",
    "model": str(HEAD),
    "num_speculative_tokens": 4,
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
# What a slip of the hand makes of the right value, field by field.
SLIPS: dict[str, Sequence[Any]] = {
    "method": ["SpecFormer", "specformer ", "dflash", "eagle3", None],
    "model": [
        None, "", "~", "/", "..", "a/b", "a:b", "\x00", 7, [str(HEAD)],
        str(TARGET), f"{HEAD}/config.json", f"{HEAD}/", f"{HEAD}\n",
    ],
    "num_speculative_tokens": [None, -1, 0, 1, 8, 9, 2.0, "4", True, 10**30],
    "verification": [None, "coupled", "Coupled", "block", ["vllm"]],
    "rejection_sample_method": ["standard", "block", "synthetic", None],
    "synthetic_acceptance_length": [0, 2.5, 5, float("nan")],
    "draft_sample_method": ["greedy", "probabilistic", "gumbel"],
    "draft_tensor_parallel_size": [0, 1, 2],
    "max_model_len": [0, 1, 64, 10**9],
    "quantization": [None, "fp8", "awq", "none"],
    "kv_cache_dtype": ["auto", "fp8", "int3"],
    "attention_backend": ["auto", "FLASH_ATTN", "MINE"],
    "use_local_argmax_reduction": [True, False, "yes"],
    "enable_adaptive_verification": [True, False],
    "parallel_drafting": [True, False],
    "disable_padded_drafter_batch": [True, False],
    CONFIDENCE: [None, 0, 0.5, 1, 1.1, "0.5", True, [[1, 64, 0.3]], [[2, 4, 0.3]], [[1, 4, 2]]],
    SCHEDULE: [None, [], [[1, 64, 4]], "1-4:2", {"1": 2}, [[1, 2]], [[2, 4, 1]], [[1, 4, -1]]],
}  # fmt: skip
FIELD_VALUES = st.sampled_from(sorted(SLIPS)).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from(SLIPS[name]) | VALUES)
)
ODD_NAMES = st.tuples(st.text(max_size=4), VALUES)
RANGES = st.lists(st.lists(st.integers(-1, 9), min_size=3, max_size=3) | VALUES, max_size=3)


@pytest.fixture(scope="module")
def target() -> ModelConfig:
    return ModelConfig(model=str(TARGET), dtype="float32", max_model_len=128)


def judge(target: ModelConfig, speculative: dict[str, Any]) -> Any:
    """The configuration; or None after a refusal that a person can act on."""
    given = copy.deepcopy(speculative)
    arguments = EngineArgs(model=str(TARGET), speculative_config=given)
    try:
        return arguments.create_speculative_config(target, ParallelConfig())
    except SpecFormerError as error:
        message = str(error)
        # An unknown name may be any text, also one with quotes.
        named = "is unknown; " in message or any(
            f"{name}=" in message or f"'{name}'" in message for name in SLIPS
        )
        if not named or "\n" in message or len(message) > 800:
            raise
    except ValidationError as error:
        # vLLM's own fields by vLLM's own checks, which name field and value.
        if not error.errors():
            raise
    return None


@settings(max_examples=100, deadline=None)
@given(
    changes=st.lists(FIELD_VALUES | ODD_NAMES, max_size=3).map(dict),
    dropped=st.sets(st.sampled_from(sorted(GOOD)), max_size=1),
)
def test_any_speculative_config(
    target: ModelConfig, changes: dict[str, Any], dropped: set[str]
) -> None:
    kept = {key: value for key, value in GOOD.items() if key not in dropped}
    config = judge(target, kept | changes)
    # Without the method it may have become any other, or none.
    if config is not None and (kept | changes).get("method") == "specformer":
        assert 1 <= config.num_speculative_tokens <= SLOTS


@settings(max_examples=60, deadline=None)
@given(ranges=RANGES)
def test_any_schedule(target: ModelConfig, ranges: list[Any]) -> None:
    """What passes is what vLLM's scheduler accepts later, when the weights are loaded."""
    if judge(target, GOOD | {SCHEDULE: ranges}) is not None:
        assert len(build_dynamic_sd_schedule_lookup(ranges, 16, 4)) == 17


@settings(max_examples=20, deadline=None)
@given(given_by_user=VALUES)
def test_no_dictionary_at_all(target: ModelConfig, given_by_user: Any) -> None:
    if not given_by_user or isinstance(given_by_user, dict):
        return
    with pytest.raises(SpeculativeConfigError, match="is not an object of named fields; write"):
        EngineArgs(model=str(TARGET), speculative_config=given_by_user).create_speculative_config(
            target, ParallelConfig()
        )
