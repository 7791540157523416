"""Each of our fields of a speculative config is judged by name, value and remedy.

No engine starts here: vLLM's own configuration code runs.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from support.configs import SLOTS, asking, configured
from support.paths import HEAD, TARGET
from vllm_specformer.engine.speculative_config import ADAPTIVE, SCHEDULE, confidence_ranges
from vllm_specformer.errors import SpeculativeConfigError


def test_arguments_may_be_asked_twice() -> None:
    """Programs look at the configuration before they start an engine with the same arguments."""
    speculative = asking(HEAD, draft_confidence_threshold=0.3)
    arguments = EngineArgs(model=str(TARGET), speculative_config=speculative, max_model_len=128)
    once, again = (arguments.create_engine_config().speculative_config for _ in range(2))
    assert confidence_ranges(once)
    assert confidence_ranges(again) == confidence_ranges(once)
    assert speculative == asking(HEAD, draft_confidence_threshold=0.3)


@pytest.mark.parametrize("tokens", [0, -1, SLOTS + 1, 2.5, "3", True])
def test_number_of_drafts(tokens: Any) -> None:
    given = re.escape(repr(tokens))
    message = rf"num_speculative_tokens={given} must be a whole number from 1 to {SLOTS}"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, tokens))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization": "fp8"}, "quantization='fp8' has no meaning for a SpecFormer head .*; le"),
        ({"use_local_argmax_reduction": True}, "use_local_argmax_reduction=True has no meaning"),
        ({"disable_padded_drafter_batch": True}, "disable_padded_drafter_batch=True has no mean"),
        ({"tree_node": 4}, "field 'tree_node' with value 4 is unknown; did you mean 'tree_nodes'"),
        ({"num_spec_tokens": 4}, "'num_spec_tokens' .* did you mean 'num_speculative_tokens'"),
        ({"zzz": None}, "field 'zzz' with value None is unknown; remove it"),
        ({ADAPTIVE: 1}, "enable_adaptive_verification=1 must be true or false"),
        ({ADAPTIVE: "yes"}, "enable_adaptive_verification='yes' must be true or false"),
        ({SCHEDULE: []}, r"per_batch_size=\[\]: it is no list of ranges; write ranges"),
        ({SCHEDULE: [[1, 4]]}, r"\[1, 4\] is not \[first, last, tokens\]"),
        ({SCHEDULE: [[1, 4, 2.5]]}, "has 2.5 for its tokens"),
        ({SCHEDULE: [[2, 4, 1]]}, "the first range must start at 1"),
        ({SCHEDULE: [[1, 4, 4], [4, 8, 2]]}, "two ranges hold the batch size 4"),
        ({SCHEDULE: [[4, 1, 4]]}, "must have whole numbers 1 <= first <= last"),
        ({SCHEDULE: [[1, 4, -1]]}, "has -1 for its tokens"),
    ],
)
def test_fields_vllm_judges_after_loading(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"verification": "exact"}, "verification='exact' must be one of 'vllm', 'coupled'"),
        (
            {"rejection_sample_method": "block"},
            "rejection_sample_method='block' does not keep the target's distribution",
        ),
        (
            {"rejection_sample_method": "fly"},
            "rejection_sample_method='fly' accepts drafts that the target would not have chosen",
        ),
        *(
            (
                {"rejection_sample_method": rule},
                f"rejection_sample_method={rule!r} is not known to keep the target distribution; "
                "leave it out",
            )
            for rule in ("a later one", "Standard", None, ["standard"])
        ),
        (
            {
                "verification": "coupled",
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rate": 0.5,
            },
            "rejection_sample_method='synthetic' is a rule of vLLM's own verification",
        ),
    ],
)
def test_refuses_verification(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=re.escape(message)):
        configured(asking(HEAD, **more))
