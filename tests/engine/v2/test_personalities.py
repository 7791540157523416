"""Same output and right drafts where the target behaves as on a GPU; see `personalities.py`.

`make test-slow` runs the folder's parity and dense tests as a whole under each.
"""

from __future__ import annotations

import pytest

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations
from support.personalities import (
    BLOCK,
    NAMES,
    SPLIT,
    counting_overlaps,
    personality,
    poisoned,
)
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, speculator


@pytest.mark.parametrize("name", NAMES)
def test_personality(name: str, reference: DenseReference, answers: dict[Tokens, Tokens]) -> None:
    """A long prompt over several blocks, cut into two steps, beside short ones."""
    texts = [LONG[1], *TEXTS[:3]]
    with (
        personality(name) as changes,
        engine(drafting(K), max_num_batched_tokens=96, **changes) as llm,
    ):
        ours = speculator(llm)
        if name in SPLIT:
            assert ours.model.attn.pages_per_block == BLOCK // SPLIT[name]
        with (
            poisoned(llm),
            watching(llm, answers) as watch,
            counting_overlaps() as steps,
        ):
            outputs = llm.generate(texts, greedy(MAX_TOKENS), use_tqdm=False)
        assert bool(steps["overlapped"]) == (name == "asynchronous")
        if name == "replayed":
            replays = ours.query_cudagraph_manager.replays
            assert replays.total() == watch.requests.total()
            assert any(requests < padded for requests, padded in replays)
    assert continuations(outputs).items() <= answers.items()
    assert max(len(d.text) for d in watch.drafted) > BLOCK
    assert_all_equal(reference, watch, at_least=40)


def test_hook_0_is_really_overwritten(
    reference: DenseReference, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its copy: the output stays the target's, the drafts go wrong."""
    from support.drafts import compare
    from vllm_specformer.engine import model

    monkeypatch.setattr(model, "keep_hooked_states", lambda *_: None)
    with (
        personality("in-place") as changes,
        engine(drafting(K), **changes) as llm,
        watching(llm, answers) as watch,
    ):
        outputs = llm.generate(TEXTS[:3], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert compare(reference, watch.drafted).wrong
