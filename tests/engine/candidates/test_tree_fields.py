"""The fields that ask for trees, judged by name, value and remedy; no engine starts here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.configs import SLOTS, asking, configured
from support.paths import HEAD
from vllm_specformer.engine.speculative_config import (
    ADAPTIVE,
    CONFIDENCE,
    MAX_TREE_NODES,
    SCHEDULE,
    TREE,
    TREE_SCHEDULE,
    TreeSettings,
    tree_settings,
    verifies_coupled,
)
from vllm_specformer.errors import SpeculativeConfigError


def test_nodes_are_vllms_drafts_and_slots_the_depth() -> None:
    plain = configured(asking(HEAD, 3)).speculative_config
    engine = configured(asking(HEAD, 3, tree_nodes=16))
    assert tree_settings(plain) is None
    assert not verifies_coupled(plain)
    config = engine.speculative_config
    assert tree_settings(config) == TreeSettings(nodes=16, slots=3)
    assert config.num_speculative_tokens == 16
    assert verifies_coupled(config)
    assert config.draft_sample_method == "greedy"  # to vLLM: no probabilities are to be kept
    # The head writes no K and V past what the target verifies.
    assert plain.max_num_new_slots_for_drafting > 0
    assert (config.max_num_new_slots_for_drafting, engine.num_lookahead_tokens) == (0, 0)


def test_all_slots_where_no_number_is_given() -> None:
    config = configured({**asking(HEAD, None), TREE: 4}).speculative_config
    assert tree_settings(config) == TreeSettings(nodes=4, slots=SLOTS)


def test_a_schedule_of_nodes() -> None:
    ranges = [[1, 4, 16], [5, 16, 6], [17, 64, 0]]
    engine = configured(asking(HEAD, 3, tree_nodes=16, tree_nodes_per_batch_size=ranges))
    found = engine.speculative_config.num_speculative_tokens_per_batch_size
    assert [list(entry) for entry in found] == ranges


@pytest.mark.parametrize("nodes", [0, -1, MAX_TREE_NODES + 1, 2.5, "8", True])
def test_numbers_of_nodes(nodes: Any) -> None:
    message = rf"tree_nodes={re.escape(repr(nodes))} must be a whole number from 1 to 63"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, 3, tree_nodes=nodes))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"verification": "vllm"}, "verification='vllm' cannot be combined with tree_nodes; leave"),
        ({SCHEDULE: [[1, 4, 2]]}, f"{SCHEDULE}=.* cannot be combined .*'{TREE_SCHEDULE}'"),
        ({CONFIDENCE: 0.5}, f"{CONFIDENCE}=0.5 cannot be combined .*'{TREE_SCHEDULE}'"),
        ({ADAPTIVE: True}, f"{ADAPTIVE}=True cannot be combined .*'{TREE_SCHEDULE}'"),
        ({"draft_sample_method": "greedy"}, "draft_sample_method='greedy' cannot be combined"),
        ({"rejection_sample_method": "synthetic"}, "rejection_sample_method='synthetic' is a rule"),
        ({TREE_SCHEDULE: [[1, 4, 17]]}, "has 17 for its nodes; write ranges .* at most tree_nodes"),
        ({TREE_SCHEDULE: [[2, 4, 3]]}, "the first range must start at 1"),
        ({TREE_SCHEDULE: []}, "it is no list of ranges"),
    ],
)
def test_fields_that_trees_cannot_have(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, 3, tree_nodes=16, **more))


def test_a_schedule_without_nodes() -> None:
    with pytest.raises(SpeculativeConfigError, match="that field is missing; set 'tree_nodes'"):
        configured(asking(HEAD, 3, tree_nodes_per_batch_size=[[1, 4, 4]]))
