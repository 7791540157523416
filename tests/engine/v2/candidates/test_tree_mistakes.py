"""Mistakes made on purpose: each changes a text, or a tree, that the other tests would see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specformer_kernels.tree_paths import TreePaths
from torch import Tensor
from vllm import SamplingParams

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations, token_ids
from support.v2.engines import TEXTS, engine, plain_answers
from support.v2.trees import differing, watching_trees
from vllm_specformer.engine.candidates import speculator
from vllm_specformer.engine.candidates.kv_layers import AlikeLayers
from vllm_specformer.engine.candidates.trees import CandidateTrees

TOKENS = 32
Mistake = Callable[[pytest.MonkeyPatch], None]


def siblings_see_siblings(patch: pytest.MonkeyPatch) -> None:
    place = CandidateTrees.place

    def placed(self: CandidateTrees, batch: Any) -> None:
        words = torch.arange(self.table.mask.shape[1])
        self.table.mask.copy_((1 << words) | ((1 << words) - 1))
        place(self, batch)

    patch.setattr(CandidateTrees, "place", placed)


def positions_by_row(patch: pytest.MonkeyPatch) -> None:
    place = CandidateTrees.place

    def placed(self: CandidateTrees, batch: Any) -> None:
        before = batch.positions.clone()
        place(self, batch)
        batch.positions.copy_(before)

    patch.setattr(CandidateTrees, "place", placed)


def nothing_moves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AlikeLayers, "move", lambda *_: None)


@pytest.fixture(scope="module")
def alone() -> dict[Tokens, Tokens]:
    return plain_answers(TEXTS[:8], TOKENS)


@pytest.mark.parametrize("mistake", [siblings_see_siblings, positions_by_row, nothing_moves])
def test_greedy_texts_change(
    mistake: Mistake, alone: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with engine(drafting(8, tree_nodes=16)) as llm:
        found = continuations(llm.generate(TEXTS[:8], greedy(TOKENS), use_tqdm=False))
    wrong = [prompt for prompt, text in found.items() if text != alone[prompt]]
    print(f"{mistake.__name__}: {len(wrong)} of {len(found)} texts changed")
    assert len(wrong) >= 2


def test_noise_by_row_changes_sampled_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(temperature=1.0, seed=n, max_tokens=16) for n in range(8)]
    with engine() as llm:
        expected = token_ids(llm.generate(TEXTS[:8], params, use_tqdm=False))
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    sample = Sampler.sample

    def by_row(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        states, index, index_np, positions, ids, local, *rest = args
        by_rows = positions + local  # as if each row came after the one before it
        return sample(self, logits, states, index, index_np, by_rows, ids, local, *rest, **kwargs)

    monkeypatch.setattr(Sampler, "sample", by_row)
    with engine(drafting(8, tree_nodes=16)) as llm:
        found = token_ids(llm.generate(TEXTS[:8], params, use_tqdm=False))
    assert sum(a != b for a, b in zip(found, expected, strict=True)) >= 2


def test_a_tree_for_a_request_with_penalties_changes_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = greedy(TOKENS, repetition_penalty=1.3, presence_penalty=1.0)
    with engine() as llm:
        expected = token_ids(llm.generate(TEXTS[:8], params, use_tqdm=False))
    monkeypatch.setattr(speculator, "depends_on_rows_before", lambda params: False)
    with engine(drafting(8, tree_nodes=16)) as llm:
        found = token_ids(llm.generate(TEXTS[:8], params, use_tqdm=False))
    assert found != expected


def test_a_stale_tree_is_verified_by_the_next_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one token each: the scheduler gives the next ones placeholders at once."""
    prompts = [{"prompt_token_ids": [token]} for token in (283, 261, 374, 271, 15, 738, 64, 69)]
    live: list[int] = []
    place = CandidateTrees.place

    def placed(self: CandidateTrees, batch: Any) -> None:
        place(self, batch)
        new = batch.num_computed_tokens_np == 0
        states = batch.idx_mapping_np[new]
        live.append(int(self.table.is_live[torch.from_numpy(states).long()].sum()))

    monkeypatch.setattr(CandidateTrees, "place", placed)

    def run() -> int:
        live.clear()
        with engine(drafting(8, tree_nodes=16), max_num_seqs=2) as llm:
            # Of different lengths, so that one starts while another one runs.
            params = [greedy(4 + 3 * (n % 3), ignore_eos=True) for n in range(len(prompts))]
            llm.generate(prompts, params, use_tqdm=False)
        return sum(live)

    assert run() == 0
    # Without the tenant's arrival, and without the root's position: somebody else's tree counts.
    monkeypatch.setattr(CandidateTrees, "admit", lambda *_: None)
    keep = CandidateTrees.keep
    monkeypatch.setattr(
        CandidateTrees,
        "keep",
        lambda self, states, roots, tree: keep(self, states, torch.zeros_like(roots), tree),
    )
    assert run() > 0


@pytest.mark.parametrize("field", ["row_slots", "last_rows"])
def test_a_wrong_context_changes_trees(
    field: str, reference: DenseReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text stays, the head drafts from elsewhere: the dense head's trees tell."""
    follow = speculator.tree_paths

    def wrong(
        table: Any, query_start_loc: Tensor, idx: Tensor, rejected: Tensor, slots: Tensor
    ) -> TreePaths:
        paths = follow(table, query_start_loc, idx, rejected, slots)
        last = query_start_loc[1 : len(idx) + 1].long() - 1 - rejected
        return paths._replace(**{field: {"row_slots": slots, "last_rows": last}[field]})

    monkeypatch.setattr(speculator, "tree_paths", wrong)
    with engine(drafting(8, tree_nodes=16)) as llm, watching_trees(llm) as watch:
        llm.generate(TEXTS[:6], greedy(16), use_tqdm=False)
    assert differing(reference, watch.drafted, 16) > 0.1 * len(watch.drafted)
