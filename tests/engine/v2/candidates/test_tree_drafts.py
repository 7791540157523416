"""Every drafted tree is the one that the dense head drafts for the same text.

A wrong context, anchor or position would leave the text as it is and only cost acceptance; here it
shows. Near ties may fall either way between the engine's sums and the dense head's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import SamplingParams

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.heads import make_head
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, engine
from support.v2.trees import DraftedTree, differing, watching_trees

SLOTS = 8
# Trees that ties may change; without a fault they are none or one.
TIES = 0.02


def assert_trees_equal(
    reference: DenseReference, drafted: list[DraftedTree], nodes: int, at_least: int
) -> None:
    wrong = differing(reference, drafted, nodes)
    print(f"{len(drafted)} trees compared, {wrong} differ")
    assert len(drafted) >= at_least
    assert wrong <= TIES * len(drafted)


@pytest.mark.parametrize("nodes", [8, 32])
def test_trees_of_greedy_and_sampled_requests(reference: DenseReference, nodes: int) -> None:
    params = [
        greedy(MAX_TOKENS)
        if n % 2
        else SamplingParams(temperature=0.8, seed=n, max_tokens=MAX_TOKENS)
        for n in range(8)
    ]
    with engine(drafting(SLOTS, tree_nodes=nodes)) as llm, watching_trees(llm) as watch:
        llm.generate(TEXTS[:8], params, use_tqdm=False)
    assert {t.temperature > 0 for t in watch.drafted} == {True, False}
    assert_trees_equal(reference, watch.drafted, nodes, at_least=20)


def test_trees_after_chunks_and_cached_prefixes(reference: DenseReference) -> None:
    changes = {"max_num_batched_tokens": 96, "enable_prefix_caching": True, "block_size": 32}
    with engine(drafting(SLOTS, tree_nodes=16), **changes) as llm:
        llm.generate(LONG[:1], greedy(MAX_TOKENS), use_tqdm=False)
        with watching_trees(llm) as watch:
            llm.generate([*LONG[:2], TEXTS[0]], greedy(MAX_TOKENS), use_tqdm=False)
    assert_trees_equal(reference, watch.drafted, 16, at_least=8)


def test_trees_of_a_head_with_gates(tmp_path: Path) -> None:
    gates = {"markov_rank": 8, "markov_gate": True}
    head = make_head(tmp_path / "head", "default", num_draft_slots=4, **gates)
    params = [greedy(12), SamplingParams(temperature=0.8, seed=1, max_tokens=12)]
    with engine(drafting(4, head, tree_nodes=12)) as llm, watching_trees(llm) as watch:
        llm.generate(TEXTS[:4], params * 2, use_tqdm=False)
    reference = DenseReference(head)
    assert_trees_equal(reference, watch.drafted, 12, at_least=20)
    reference.head.config.markov_gate = False
    assert differing(reference, watch.drafted, 12) > len(watch.drafted) / 2
