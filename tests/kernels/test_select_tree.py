"""Trees: kernel and reference against a heap, against all paths, and through the other ops."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.sample_candidates import sample_candidates
from specformer_kernels.select_tree import Tree, fixed_tree, reference, triton_kernel
from specformer_kernels.verify import verify
from torch import Tensor

IMPLEMENTATIONS = [reference.select_tree, triton_kernel.select_tree]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])


def make_candidates(
    num_requests: int, num_slots: int, num_candidates: int, seed: int = 42
) -> tuple[Tensor, Tensor]:
    """Log-probabilities in steps of 2**-6: sums are exact, equal paths are frequent."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_requests, num_slots, num_candidates)
    log_probs = -torch.randint(1, 200, shape, generator=generator) / 64
    return log_probs, torch.randint(0, 100_000, shape, generator=generator)


def run(implementation: Callable, device: str, log_probs: Tensor, tokens: Tensor, n: int) -> Tree:
    found = implementation(log_probs.to(device), tokens.to(device), n)
    return Tree(*(tensor.cpu() for tensor in found))


def best_first(log_probs: Tensor, tokens: Tensor, num_nodes: int) -> Tree:
    """One request, [K, c]: the tree as the docstring orders it, from a heap of all children."""
    out, parents, depths, words = [-1], [0], [0], [1]
    heap: list[tuple] = []

    def push_children(node: int, path: float, depth: int) -> None:
        if depth == log_probs.shape[0]:
            return
        pairs = zip(log_probs[depth].tolist(), tokens[depth].tolist(), strict=True)
        for candidate, (log_prob, token) in enumerate(pairs):
            if token >= 0 and math.isfinite(log_prob):
                heapq.heappush(heap, (-(path + log_prob), node, -log_prob, candidate, token))

    push_children(0, 0.0, 0)
    while heap and len(out) <= num_nodes:
        cost, parent, _, _, token = heapq.heappop(heap)
        node = len(out)
        out.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
        words.append(words[parent] | 1 << node)
        push_children(node, -cost, depths[node])
    for row in range(len(out), num_nodes + 1):
        out.append(-1)
        parents.append(0)
        depths.append(1)
        words.append(1 << row)
    return Tree(
        torch.tensor(out),
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(depths, dtype=torch.int32),
        torch.tensor([word - (word >> 63 << 64) for word in words]),
    )


def assert_is(found: Tree, log_probs: Tensor, tokens: Tensor) -> None:
    num_nodes = found.tokens.shape[1] - 1
    for request in range(len(log_probs)):
        expected = best_first(log_probs[request], tokens[request], num_nodes)
        for name in Tree._fields:
            one, other = getattr(found, name)[request], getattr(expected, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


@EACH
@pytest.mark.parametrize(
    ("num_slots", "num_candidates", "num_nodes"),
    [(1, 1, 1), (8, 1, 8), (1, 16, 7), (4, 3, 12), (3, 5, 31), (8, 4, 32), (5, 16, 63)],
)
def test_is_best_first(
    num_slots: int,
    num_candidates: int,
    num_nodes: int,
    implementation: Callable,
    kernel_device: str,
) -> None:
    log_probs, tokens = make_candidates(3, num_slots, num_candidates)
    found = run(implementation, kernel_device, log_probs, tokens, num_nodes)
    assert_is(found, log_probs, tokens)


@EACH
@pytest.mark.parametrize("num_candidates", [1, 2, 3])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
def test_nodes_are_the_most_probable_of_all_paths(
    num_slots: int, num_candidates: int, implementation: Callable, kernel_device: str
) -> None:
    log_probs, tokens = make_candidates(2, num_slots, num_candidates, seed=num_slots)
    found = run(implementation, kernel_device, log_probs, tokens, 10)
    for request in range(2):
        slots = [slot.tolist() for slot in log_probs[request]]
        paths = (itertools.product(*slots[:depth]) for depth in range(1, num_slots + 1))
        best = sorted((sum(path) for path in itertools.chain(*paths)), reverse=True)[:10]
        kept = []
        for node in range(1, len(best) + 1):
            path, row = 0.0, node
            while row:
                slot = int(found.depths[request, row]) - 1
                choice = tokens[request, slot] == found.tokens[request, row]
                path += float(log_probs[request, slot, choice.int().argmax()])
                row = int(found.parents[request, row])
            kept.append(path)
        assert kept == best
        assert (found.tokens[request, len(best) + 1 :] == -1).all()


@EACH
def test_mask_holds_the_ancestors(implementation: Callable, kernel_device: str) -> None:
    found = run(implementation, kernel_device, *make_candidates(2, 6, 8), 63)
    for parents, words in zip(found.parents.tolist(), found.mask.tolist(), strict=True):
        for row, word in enumerate(words):
            ancestors, node = {row}, row
            while node:
                assert parents[node] < node
                node = parents[node]
                ancestors.add(node)
            assert {bit for bit in range(64) if word >> bit & 1} == ancestors


@EACH
def test_a_tree_that_runs_out_of_nodes(implementation: Callable, kernel_device: str) -> None:
    """Padded candidates, useless weights, and a request without any candidate."""
    log_probs, tokens = make_candidates(3, 3, 3)
    log_probs[0, 1] = torch.tensor([-math.inf, math.nan, math.inf])  # nothing below depth 1
    tokens[0, 0, 1] = -1
    tokens[1] = -1
    log_probs[2, 2, 1:] = -math.inf
    found = run(implementation, kernel_device, log_probs, tokens, 40)
    assert (found.tokens >= 0).sum(-1).tolist() == [2, 0, 3 + 9 + 9]
    assert_is(found, log_probs, tokens)
    assert found.depths[1].tolist() == [0] + [1] * 40
    assert found.mask[1].tolist() == [1 << row for row in range(41)]


@EACH
def test_equal_paths(implementation: Callable, kernel_device: str) -> None:
    """Weights of 0 tie everything: the lower parent first, then the lower candidate."""
    log_probs, tokens = torch.zeros(1, 2, 3), torch.arange(6).view(1, 2, 3)
    log_probs[0, 1, 1] = -0.0
    found = run(implementation, kernel_device, log_probs, tokens, 8)
    assert found.tokens.tolist() == [[-1, 0, 1, 2, 3, 4, 5, 3, 4]]
    assert found.parents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]


def test_rounded_sums_agree(kernel_device: str) -> None:
    """Sums that round: both add in the same order, so that near ties fall alike."""
    shape = (4, 6, 4)
    log_probs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = torch.arange(log_probs.numel()).view(shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trees = [run(f, kernel_device, log_probs.to(dtype), tokens, 24) for f in IMPLEMENTATIONS]
        assert all(torch.equal(*pair) for pair in zip(*trees, strict=True))
    double = reference.select_tree(log_probs.double(), tokens, 24)
    assert torch.equal(double.tokens, reference.select_tree(log_probs, tokens, 24).tokens)


def test_no_requests(kernel_device: str) -> None:
    for implementation in IMPLEMENTATIONS:
        found = run(implementation, kernel_device, *make_candidates(0, 2, 2), 5)
        assert all(tensor.shape == (0, 6) for tensor in found)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_candidates(data: st.DataObject, kernel_device: str) -> None:
    shape = tuple(data.draw(st.integers(1, limit)) for limit in (2, 5, 6))
    size = math.prod(shape)
    weights = st.sampled_from([0.0, -0.5, -0.75, -3.0, -math.inf, math.nan])
    log_probs = torch.tensor(data.draw(st.lists(weights, min_size=size, max_size=size)))
    names = st.lists(st.integers(-1, 9), min_size=size, max_size=size)
    tokens = torch.tensor(data.draw(names))
    num_nodes = data.draw(st.integers(1, 20))
    for implementation in IMPLEMENTATIONS:
        log_probs, tokens = log_probs.view(shape), tokens.view(shape)
        assert_is(
            run(implementation, kernel_device, log_probs, tokens, num_nodes), log_probs, tokens
        )


def test_candidates_become_a_tree(kernel_device: str) -> None:
    """From logits, through the candidates' own padding, to a tree."""
    logits = torch.full((6, 50), -math.inf)  # 2 requests, 3 slots
    logits[:, 20:23] = torch.tensor([2.0, 0.0, -1.0])
    logits[1, 20:22] = -math.inf  # one token left
    candidates = sample_candidates(logits, 4)
    arguments = candidates.log_probs.view(2, 3, 4), candidates.tokens.view(2, 3, 4)
    for implementation in IMPLEMENTATIONS:
        found = run(implementation, kernel_device, *arguments, 15)
        assert_is(found, *arguments)
        assert (found.tokens >= 0).sum(-1).tolist() == [3 + 3 + 9, 15]
        assert set(found.tokens[0, found.depths[0] == 2].tolist()) == {22}


def generate(select: Callable, device: str, seed: int, num_nodes: int) -> tuple[list[int], int]:
    """24 tokens of a toy target by coupled verification, and the steps that took.

    The target's logits depend on the two last tokens; the draft's on what follows most probably.
    """
    num_slots, vocabulary, temperature, prompt = 3, 20, 0.6, [3, 7]
    tables = 1.5 * torch.randn(
        2, vocabulary, vocabulary, generator=torch.Generator().manual_seed(0)
    )

    def target(text: list[int]) -> Tensor:
        return tables[0, text[-1]] + tables[1, text[-2]]

    text, steps = list(prompt), 0
    while len(text) < len(prompt) + 24:
        root, seeds = len(text) - 1, torch.full((num_slots,), seed)
        paths, tree = [text], None
        if num_nodes:
            guess, rows = list(text), []
            for _ in range(num_slots):
                rows.append(target(guess))
                guess.append(int(rows[-1].argmax()))
            candidates = sample_candidates(
                torch.stack(rows),
                3,
                temperature=torch.full((num_slots,), temperature),
                seeds=seeds,
                positions=root + torch.arange(num_slots),
                coupled=True,
            )
            lists = candidates.log_probs[None], candidates.tokens[None]
            tree = run(select, device, *lists, num_nodes)
            nodes = zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True)
            for token, parent in nodes:
                paths.append([*paths[parent], token])
        verified = verify(
            torch.stack([target(path) for path in paths]),
            torch.tensor([-1]) if tree is None else tree.tokens[0],
            torch.tensor([0, len(paths)], dtype=torch.int32),
            num_nodes + 1,
            rule="coupled",
            parents=None if tree is None else tree.parents[0],
            temperature=torch.tensor([temperature]),
            seeds=seeds[:1],
            positions=torch.tensor([root]) if tree is None else root + tree.depths[0].long(),
        )
        text += verified.tokens[0, : int(verified.num_tokens[0])].tolist()
        steps += 1
    return text[len(prompt) : len(prompt) + 24], steps


@EACH
@pytest.mark.parametrize("seed", [5, 2**40 + 1])
def test_a_coupled_text_does_not_depend_on_the_tree(
    seed: int, implementation: Callable, kernel_device: str
) -> None:
    plain, plain_steps = generate(implementation, kernel_device, seed, 0)
    assert plain_steps == len(plain)
    for num_nodes in (2, 9):
        text, steps = generate(implementation, kernel_device, seed, num_nodes)
        assert text == plain
        assert steps < len(plain)  # some candidates were kept


def test_fixed_tree() -> None:
    tree = fixed_tree([2, 2, 1])
    assert tree.parents.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert tree.candidates.tolist() == [-1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0]
    assert [f"{word:b}" for word in tree.mask[[0, 2, 6, 10]]] == [
        "1",
        "101",
        "1000101",
        "10001000101",
    ]
    chain = fixed_tree([1] * 63)
    assert chain.parents.tolist() == [0, *range(63)]
    assert chain.mask[-1] == -1  # all 64 bits
    assert len(fixed_tree([4, 2, 1, 1]).parents) == 1 + 4 + 8 + 8 + 8


def test_fixed_tree_is_the_whole_product_where_all_fits() -> None:
    """select_tree of everything keeps the nodes of the fixed tree with full widths."""
    log_probs, tokens = make_candidates(1, 3, 3)
    selected = reference.select_tree(log_probs, tokens, 39)
    shape = fixed_tree([3, 3, 3])
    fixed_tokens = tokens[0, shape.depths.long() - 1, shape.candidates]
    fixed_tokens[0] = -1

    def paths(tree_tokens: Tensor, parents: Tensor) -> set[tuple[int, ...]]:
        found: list[tuple[int, ...]] = [()]
        for token, parent in zip(tree_tokens[1:].tolist(), parents[1:].tolist(), strict=True):
            found.append((*found[parent], token))
        return set(found)

    assert paths(selected.tokens[0], selected.parents[0]) == paths(fixed_tokens, shape.parents)


@pytest.mark.parametrize("widths", [[2, 0], [64], [8, 8]])
def test_fixed_tree_refuses(widths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^widths: expected"):
        fixed_tree(widths)


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_probs", torch.zeros(3, 2)),
        ("log_probs", torch.zeros(3, 0, 2)),
        ("log_probs", torch.zeros(3, 4, 17)),
        ("log_probs", torch.zeros(3, 4, 2, dtype=torch.int64)),
        ("log_probs", torch.zeros(3, 2, 4).mT),
        ("tokens", torch.zeros(3, 4, 3, dtype=torch.int64)),
        ("tokens", torch.zeros(3, 4, 2, dtype=torch.int32)),
        ("tokens", torch.zeros(3, 2, 4, dtype=torch.int64).mT),
        ("num_nodes", 0),
        ("num_nodes", 64),
    ],
)
def test_refuses_arguments(name: str, value: object, implementation: Callable) -> None:
    arguments = {
        "log_probs": torch.zeros(3, 4, 2),
        "tokens": torch.zeros(3, 4, 2, dtype=torch.int64),
        "num_nodes": 5,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation(**(arguments | {name: value}))


def test_kernel_refuses_float64() -> None:
    log_probs, tokens = make_candidates(1, 2, 2)
    with pytest.raises(ValueError, match=r"^log_probs: "):
        triton_kernel.select_tree(log_probs.double(), tokens, 3)
