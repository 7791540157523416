"""Drafted trees against a search over paths that scores every node by itself."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import pytest
import torch
from specformer_kernels.noise import Stream, gumbel
from specformer_kernels.select_tree import Tree
from torch import Tensor
from transformers import Qwen3Config

from vllm_specformer import candidates
from vllm_specformer.candidates import draft_tree
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead

VOCAB, SLOTS = 40, 5
RANKING, SAMPLED = (0.7, 0.7, 0.85, 1.0, 1.2), (0.9, 1.1, 1.0, 0.8, 0.7)
# A path of the root's descendants, and what it weighs.
Paths = dict[tuple[int, ...], float]


def make(**changes: Any) -> SpecFormerHead:
    target = Qwen3Config(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    rankings = {"tree_ranking": RANKING, "tree_ranking_sampled": SAMPLED}
    fields = {"num_draft_slots": SLOTS} | rankings | changes
    head = SpecFormerHead(SpecFormerConfig.preset("default", target, "t", **fields))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    if head.draft_token_ids is not None:
        head.draft_token_ids.copy_(torch.randperm(VOCAB)[: len(head.draft_token_ids)].sort().values)
    return head


HEADS = pytest.mark.parametrize(
    "changes",
    [
        {"markov_rank": 3},
        {"markov_rank": 3, "markov_gate": True},
        {"markov_rank": 3, "draft_vocab_size": 25},
        {"draft_vocab_size": 25},
        {"tree_ranking": (), "tree_ranking_sampled": ()},
    ],
    ids=["markov", "gates", "markov, draft vocabulary", "draft vocabulary", "plain"],
)


def inputs(requests: int, slots: int = SLOTS) -> dict[str, Tensor]:
    """Greedy and sampled requests in turn."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(requests)
    return {
        "logits": 2 * torch.randn(requests, slots, VOCAB, generator=generator),
        "bonus_tokens": torch.randint(VOCAB, (requests,), generator=generator),
        "temperature": torch.tensor([0.0, 1.0, 0.6, 1.5]).repeat(requests)[:requests],
        "seeds": rows * (2**33 + 7) - 5,
        "positions": 100 + 3 * rows,
    }


def case(requests: int, **changes: Any) -> tuple[SpecFormerHead, dict[str, Tensor]]:
    """A head, and inputs for it; with gates if it has them."""
    head, given = make(**changes), inputs(requests)
    if head.config.markov_gate:
        given["gates"] = torch.randn(requests, SLOTS, head.config.markov_rank)
        given["gates"][:, 0] = 0  # as `markov_gates` has them
    return head, given


class Oracle:
    """One request: log-probabilities of a node's children, node by node, by target id."""

    def __init__(self, head: SpecFormerHead, given: dict[str, Tensor], request: int) -> None:
        self.head = head
        self.logits, self.bonus = given["logits"][request], given["bonus_tokens"][request]
        self.heat = float(given["temperature"][request])
        self.seed, self.anchor = given["seeds"][request], given["positions"][request]
        self.slots = len(self.logits)
        gates = given.get("gates")
        self.gates = [None] * self.slots if gates is None else gates[request]

    @torch.no_grad()
    def children(self, path: tuple[int, ...]) -> list[tuple[float, int]]:
        """The LIST best, the best first."""
        slot, head = len(path), self.head
        ids = torch.arange(VOCAB) if head.draft_token_ids is None else head.draft_token_ids
        scores = self.logits[slot, ids].double()
        if head.config.markov_rank:
            previous = torch.tensor([*self.bonus[None], *path])[-1]
            scores = scores + head.markov_logits(previous, self.gates[slot])
        if self.heat > 0:
            position = self.anchor + 1 + slot
            noise = gumbel(self.seed, position, ids, Stream.TARGET, torch.float64)
            scores = (scores / self.heat + noise) * self.heat
        ranking = candidates.Ranking.of(head.config)
        tau = (ranking.sampled if self.heat > 0 else ranking.greedy)[slot]
        best = (scores / tau).log_softmax(-1).sort(descending=True)
        values, places = best.values[: candidates.LIST].tolist(), best.indices.tolist()
        return [(value, int(ids[place])) for value, place in zip(values, places, strict=False)]

    def best_first(self, num_nodes: int) -> Paths:
        """Every node of the tree offers its children; the best offer enters."""
        found: Paths = {}
        heap = [(-value, (token,)) for value, token in self.children(())]
        heapq.heapify(heap)
        while heap and len(found) < num_nodes:
            cost, path = heapq.heappop(heap)
            found[path] = -cost
            if len(path) < self.slots:
                for value, token in self.children(path):
                    heapq.heappush(heap, (cost - value, (*path, token)))
        return found

    def beam(self, num_nodes: int) -> Paths:
        """The children of the BEAM best nodes of each slot, and the best of them all."""
        nodes: Paths = {}
        parents: Paths = {(): 0.0}
        for _ in range(self.slots):
            level = {
                (*path, token): weight + value
                for path, weight in parents.items()
                for value, token in self.children(path)
            }
            nodes |= level
            parents = dict(sorted(level.items(), key=lambda item: -item[1])[: candidates.BEAM])
        return dict(sorted(nodes.items(), key=lambda item: -item[1])[:num_nodes])


def paths_of(tree: Tree, request: int) -> list[tuple[int, ...]]:
    """The path of every node, in the tree's order; inert rows are left out."""
    rows: list[tuple[int, ...]] = [()]
    for row in range(1, tree.tokens.shape[1]):
        token, parent = int(tree.tokens[request, row]), int(tree.parents[request, row])
        rows.append((*rows[parent], token) if token >= 0 else ())
        assert int(tree.depths[request, row]) == max(1, len(rows[-1]))
    return [path for path in rows[1:] if path]


def assert_is(tree: Tree, expected: Callable[[int], Paths]) -> None:
    """The same nodes; the main chain first, then by falling weight."""
    for request in range(len(tree.tokens)):
        found, wanted = paths_of(tree, request), expected(request)
        assert set(found) == set(wanted)
        best = max((path for path in wanted if len(path) == 1), key=wanted.__getitem__)
        length = 0
        while True:
            length += 1
            assert found[length - 1] == best
            below = [path for path in wanted if path[:-1] == best]
            if not below:
                break
            best = max(below, key=wanted.__getitem__)
        weights = [wanted[path] for path in found[length:]]
        assert weights == sorted(weights, reverse=True)


@HEADS
@pytest.mark.parametrize("num_nodes", [1, 4, 16, 63])
def test_is_the_best_of_a_beam(num_nodes: int, changes: dict[str, Any]) -> None:
    head, given = case(8, **changes)
    tree = draft_tree(head, num_nodes=num_nodes, **given)
    assert_is(tree, lambda request: Oracle(head, given, request).beam(num_nodes))


@HEADS
def test_a_wide_beam_finds_what_the_best_first_search_finds(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that has children in a tree of n is among the n best of its slot."""
    monkeypatch.setattr(candidates, "BEAM", 8)
    head, given = case(8, **changes)
    tree = draft_tree(head, num_nodes=8, **given)
    assert_is(tree, lambda request: Oracle(head, given, request).best_first(8))


def test_requests_do_not_depend_on_each_other() -> None:
    head, given = make(markov_rank=3), inputs(6)
    together = draft_tree(head, num_nodes=20, **given)
    for request in range(6):
        one = {name: values[request : request + 1] for name, values in given.items()}
        alone = draft_tree(head, num_nodes=20, **one)
        assert all(torch.equal(a[0], b[request]) for a, b in zip(alone, together, strict=True))


def test_without_temperatures_all_are_greedy() -> None:
    head, given = make(markov_rank=3), inputs(4)
    greedy = draft_tree(head, given["logits"], given["bonus_tokens"], 16)
    cold = draft_tree(head, num_nodes=16, **(given | {"temperature": torch.zeros(4)}))
    assert all(torch.equal(a, b) for a, b in zip(greedy, cold, strict=True))


@HEADS
def test_main_chain_is_the_plain_draft(changes: dict[str, Any]) -> None:
    """At temperature 0; where the beam lost it, it ends early."""
    head, given = case(8, **changes)
    greedy = {name: given[name] for name in ("logits", "bonus_tokens", "gates") if name in given}
    drafts = head.draft(**greedy)
    tree = draft_tree(head, num_nodes=63, **greedy)
    for request in range(8):
        best = max(paths_of(tree, request)[:SLOTS], key=len)
        assert best == tuple(drafts[request, : len(best)].tolist())


@HEADS
@pytest.mark.parametrize("num_nodes", [3, 5, 16])
def test_chains(num_nodes: int, changes: dict[str, Any]) -> None:
    """Each the best child of the one before, also where a tree would have ended it earlier."""
    head, given = case(8, **changes)
    chains = torch.arange(8) % 3 != 0
    tree = draft_tree(head, num_nodes=num_nodes, chains=chains, **given)
    plain = draft_tree(head, num_nodes=num_nodes, **given)
    length = min(num_nodes, SLOTS)
    for request in range(8):
        if not chains[request]:
            assert all(
                torch.equal(a[request], b[request]) for a, b in zip(tree, plain, strict=True)
            )
            continue
        oracle, path = Oracle(head, given, request), ()
        for _ in range(length):
            path = (*path, oracle.children(path)[0][1])
        assert tree.tokens[request].tolist() == [-1, *path] + [-1] * (num_nodes - length)
        assert tree.parents[request, : length + 1].tolist() == [0, *range(length)]
        assert (tree.parents[request, length + 1 :] == 0).all()


def test_fewer_slots_than_the_head_has() -> None:
    head, given = make(markov_rank=3), inputs(4, slots=2)
    tree = draft_tree(head, num_nodes=16, **given)
    assert int(tree.depths.max()) == 2
    assert_is(tree, lambda request: Oracle(head, given, request).beam(16))


def test_logits_of_the_draft_vocabulary_or_of_all() -> None:
    head, given = make(markov_rank=3, draft_vocab_size=25), inputs(4)
    narrow = given | {"logits": given["logits"][..., head.draft_token_ids]}
    trees = [draft_tree(head, num_nodes=16, **each) for each in (given, narrow)]
    assert all(torch.equal(a, b) for a, b in zip(*trees, strict=True))


def test_fewer_tokens_than_a_list_has() -> None:
    head, given = make(markov_rank=3, draft_vocab_size=3), inputs(4)
    tree = draft_tree(head, num_nodes=63, **given)
    assert (tree.tokens[:, 1:4] >= 0).all()
    assert_is(tree, lambda request: Oracle(head, given, request).beam(63))


def test_the_targets_own_sample_is_a_child_of_the_root_exactly_if_it_ranks_high_enough() -> None:
    """The target samples with the very noise that the head drafts with."""
    requests = 64
    head, given = make(), inputs(requests)
    given["temperature"] = torch.linspace(0.3, 1.5, requests)
    tree = draft_tree(head, num_nodes=63, **given)
    position = given["positions"] + 1
    noise = gumbel(given["seeds"][:, None], position[:, None], torch.arange(VOCAB), Stream.TARGET)
    own = given["logits"][:, 0] / given["temperature"][:, None] + noise
    target = own + torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
    sampled, hits = target.argmax(-1), 0
    for request in range(requests):
        rank = int((own[request] > own[request, sampled[request]]).sum())
        children = {path[0] for path in paths_of(tree, request) if len(path) == 1}
        assert children <= set(own[request].topk(candidates.LIST).indices.tolist())
        if rank < len(children):
            hits += 1
        assert (int(sampled[request]) in children) == (rank < len(children))
    assert requests // 2 < hits
