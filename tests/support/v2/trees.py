"""Look into the speculator that drafts trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm import LLM

from support.dense import DenseReference
from support.outputs import Tokens
from support.v2.engines import runner
from vllm_specformer.candidates import draft_tree
from vllm_specformer.engine.candidates.speculator import CandidateSpeculator
from vllm_specformer.engine.candidates.trees import CandidateTrees


@dataclass(frozen=True)
class DraftedTree:
    """A tree as it was kept, without what is no node, and the text it was drafted for."""

    text: Tokens
    temperature: float
    seed: int
    tokens: Tokens
    parents: Tokens


@dataclass
class TreeWatch:
    """What happened to trees."""

    drafted: list[DraftedTree] = field(default_factory=list)
    nodes: Counter[int] = field(default_factory=Counter)  # steps by nodes asked for
    moved: Counter[bool] = field(default_factory=Counter)  # paths by whether K and V moved
    rows: Counter[str] = field(default_factory=Counter)
    tenants: int = 0


@contextmanager
def watching_trees(llm: LLM) -> Iterator[TreeWatch]:
    """Record every drafted tree and what became of it."""
    watch, states = TreeWatch(), runner(llm).req_states
    propose, place, admit = CandidateSpeculator.propose, CandidateTrees.place, CandidateTrees.admit

    def watched(self: CandidateSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        wanted = kwargs.get("num_speculative_tokens")
        made = self.num_speculative_steps if wanted is None else wanted
        for state in batch.idx_mapping.tolist():
            if self.trees.table.is_live[state]:
                path = [node for node in self.trees.table.paths[state].tolist() if node >= 0]
                watch.moved[path != list(range(len(path)))] += 1
        drafts = propose(self, batch, *args, **kwargs)
        watch.nodes[made] += 1
        for row, state in enumerate(batch.idx_mapping.tolist() if made else []):
            if not int(args[4][row]):
                continue
            length = int(states.total_len.gpu[state])
            table = self.trees.table
            real = [0, *(n for n in range(1, made + 1) if int(table.tokens[state, n]) >= 0)]
            watch.drafted.append(
                DraftedTree(
                    text=tuple(states.all_token_ids.gpu[state, :length].tolist()),
                    temperature=float(self.temperature[state]),
                    seed=int(self.seeds[state]),
                    tokens=tuple(table.tokens[state, real].tolist()),
                    parents=tuple(table.parents[state, real].tolist()),
                )
            )
        return drafts

    def placed(self: CandidateTrees, batch: Any) -> None:
        place(self, batch)
        _, rows = self._block
        watch.rows["beyond the block"] += batch.num_tokens - rows
        drafts = batch.num_draft_tokens_per_req
        own = 0 if drafts is None else int((drafts + (drafts > 0)).sum())
        watch.rows["prompt in the block"] += max(0, rows - own) if batch.has_prefill else 0

    def admitted(self: CandidateTrees, state: int, needs_chain: bool) -> None:
        watch.tenants += 1
        admit(self, state, needs_chain)

    with (
        mock.patch.object(CandidateSpeculator, "propose", watched),
        mock.patch.object(CandidateTrees, "place", placed),
        mock.patch.object(CandidateTrees, "admit", admitted),
    ):
        yield watch


def dense_tree(reference: DenseReference, drafted: DraftedTree, nodes: int) -> tuple[Tokens, ...]:
    """Tokens and parents of the dense head's tree."""
    anchor = len(drafted.text) - 2
    slots = reference.slot_states(drafted.text, [anchor])
    tree = draft_tree(
        reference.head,
        reference.target.lm_head(slots),
        torch.tensor([drafted.text[-1]]),
        nodes,
        gates=reference.head.markov_gates(slots),
        temperature=torch.tensor([drafted.temperature]),
        seeds=torch.tensor([drafted.seed]),
        positions=torch.tensor([anchor]),
    )
    real = [0, *(n for n in range(1, nodes + 1) if int(tree.tokens[0, n]) >= 0)]
    return tuple(tree.tokens[0, real].tolist()), tuple(tree.parents[0, real].tolist())


def differing(reference: DenseReference, drafted: Sequence[DraftedTree], nodes: int) -> int:
    """How many of the trees are not the dense head's."""
    return sum(
        dense_tree(reference, tree, nodes) != (tree.tokens, tree.parents) for tree in drafted
    )
