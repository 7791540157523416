"""Trees where the target behaves as on a GPU; see tests/support/personalities.py."""

from __future__ import annotations

import pytest

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations
from support.personalities import NAMES, counting_overlaps, personality
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, engine, speculator
from support.v2.trees import differing, watching_trees


@pytest.mark.parametrize("name", NAMES)
def test_personality(name: str, reference: DenseReference, answers: dict[Tokens, Tokens]) -> None:
    """A long prompt over several blocks, cut into two steps, beside short ones."""
    texts = [LONG[1], *TEXTS[:3]]
    with (
        personality(name) as changes,
        engine(drafting(8, tree_nodes=16), max_num_batched_tokens=96, **changes) as llm,
        counting_overlaps() as steps,
        watching_trees(llm) as watch,
    ):
        outputs = llm.generate(texts, greedy(MAX_TOKENS), use_tqdm=False)
        assert bool(steps["overlapped"]) == (name == "asynchronous")
        if name == "replayed":
            replays = speculator(llm).query_cudagraph_manager.replays
            assert any(requests < padded for requests, padded in replays)
    assert continuations(outputs).items() <= answers.items()
    assert len(watch.drafted) >= 10
    assert watch.moved[True] > 0
    # Asynchronous steps run for requests that have ended, too; their texts are as long as ever.
    assert differing(reference, watch.drafted, 16) <= len(watch.drafted) // 20
