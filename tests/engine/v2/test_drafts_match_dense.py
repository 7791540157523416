"""Every draft of the V2 speculator is the one the dense head proposes on the same tokens.

Losslessness does not show that the head's paged cache is right: with wrong K/V the output stays the
same and only acceptance falls. This does show it.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from support.dense import DenseReference
from support.drafts import compare
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations, counting
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, plain_answers
from vllm_specformer.engine.model import SpecFormerDraftModel


def test_after_rejections_with_mixed_lengths(
    reference: DenseReference, answers: dict[Tokens, Tokens]
) -> None:
    params = [greedy(MAX_TOKENS - n % 5) for n in range(12)]
    with engine(drafting(K)) as llm, watching(llm, answers) as watch:
        outputs = llm.generate([*TEXTS[:10], *LONG[:2]], params, use_tqdm=False)
    found = continuations(outputs)
    assert all(answers[p][: len(t)] == t for p, t in found.items())
    assert min(watch.helped[n] for n in range(K + 1)) > 0
    assert len(watch.requests) >= 3, "batches of one size only"
    assert_all_equal(reference, watch, at_least=80)


def test_chunked_prefill(reference: DenseReference, answers: dict[Tokens, Tokens]) -> None:
    with (
        engine(drafting(K), max_num_batched_tokens=48, max_num_seqs=4) as llm,
        watching(llm, answers) as watch,
    ):
        outputs = llm.generate([*LONG[:2], *TEXTS[:4]], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert watch.unsampled_rows > 0, "no prompt was cut"
    assert_all_equal(reference, watch, at_least=60)


@pytest.mark.parametrize("keep_last_block", [False, True])
def test_prefix_cache(
    reference: DenseReference, answers: dict[Tokens, Tokens], keep_last_block: bool
) -> None:
    speculative = drafting(K, disable_eagle_block_drop=keep_last_block)
    with engine(speculative, enable_prefix_caching=True, block_size=32) as llm:
        llm.generate(LONG, greedy(MAX_TOKENS), use_tqdm=False)
        with watching(llm, answers) as watch, counting(llm) as counted:
            outputs = llm.generate(LONG, greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    print(f"prefix cache hits {counted['prefix_cache_hits']}; ", end="")
    assert counted["prefix_cache_hits"] >= 32 * len(LONG)
    assert_all_equal(reference, watch, at_least=20)


def test_preemption(reference: DenseReference) -> None:
    texts, long = TEXTS[:4], {"ignore_eos": True}
    expected = plain_answers(texts, 48, **long)
    with (
        engine(drafting(K), max_model_len=128, num_gpu_blocks_override=9, block_size=32) as llm,
        watching(llm, expected) as watch,
        counting(llm) as counted,
    ):
        outputs = llm.generate(texts, greedy(48, **long), use_tqdm=False)
    assert continuations(outputs) == expected
    print(f"preemptions {counted['num_preemptions']}; ", end="")
    assert counted["num_preemptions"] > 0
    assert_all_equal(reference, watch, at_least=200)


def test_steps_without_drafts_store_the_context(
    reference: DenseReference, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is asked for no draft leaves no hole; the second half shows what one does."""
    with engine(drafting(K)) as llm:
        with watching(llm, answers, skip_drafting=lambda step: step % 3 != 2) as watch:
            outputs = llm.generate([*TEXTS[:7], LONG[0]], greedy(MAX_TOKENS), use_tqdm=False)
        assert continuations(outputs).items() <= answers.items()
        assert 0 < watch.tokens[K] < watch.tokens[0]
        assert_all_equal(reference, watch, at_least=20)

        skipping = [False]
        store = SpecFormerDraftModel.store_context_and_query

        def store_unless_skipping(self: SpecFormerDraftModel, *args: Any) -> Tensor | None:
            return None if skipping[0] else store(self, *args)

        def skip(step: int) -> bool:
            skipping[0] = step % 3 != 2
            return skipping[0]

        monkeypatch.setattr(SpecFormerDraftModel, "store_context_and_query", store_unless_skipping)
        with watching(llm, answers, skip_drafting=skip) as holes:
            outputs = llm.generate(TEXTS[8:12], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert compare(reference, holes.drafted).wrong, "the comparison does not see a hole"
