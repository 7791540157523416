"""Trees: kernel and reference against plain loops over all nodes, and through the other ops."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.select_tree import Beam, Tree, fixed_tree, reference, triton_kernel
from specformer_kernels.tree_candidates import tree_candidates
from specformer_kernels.verify import verify
from torch import Tensor

IMPLEMENTATIONS = [reference, triton_kernel]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])


def make_lists(
    requests: int, slots: int, beam: int, candidates: int, seed: int = 42
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities in steps of 2**-6: sums are exact, equal paths are frequent.

    Rows descend from any candidate of the slot before, also from those of dead rows.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (requests, slots, beam, candidates)
    log_probs = -torch.randint(1, 200, shape, generator=generator) / 64
    tokens = torch.randint(0, 100_000, shape, generator=generator)
    order = torch.rand(requests, slots, beam * candidates, generator=generator).argsort(-1)
    return log_probs, tokens, order[..., :beam].contiguous()


def beam_lists(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """The origins [R, K, w] that `extend_beam` would choose for such lists."""
    paths, origins = None, [torch.zeros(log_probs.shape[0], log_probs.shape[2], dtype=torch.int64)]
    for slot in range(log_probs.shape[1] - 1):
        found = reference.extend_beam(
            log_probs[:, slot], tokens[:, slot], paths, log_probs.shape[2]
        )
        origins.append(found.origins)
        paths = found.paths
    return torch.stack(origins, 1)


def run(implementation: ModuleType, device: str, *arguments: object) -> Tree:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    return Tree(*(tensor.cpu() for tensor in implementation.select_tree(*moved)))


def children(paths: list[float], log_probs: Tensor, tokens: Tensor) -> dict[int, tuple[float, int]]:
    """One slot, [w, c]: sum along the path, and token, of every child that may be taken."""
    found = {}
    for row, path in enumerate(paths):
        for candidate, log_prob in enumerate(log_probs[row].tolist()):
            token = int(tokens[row, candidate])
            if token >= 0 and math.isfinite(log_prob) and math.isfinite(path):
                number = row * log_probs.shape[1] + candidate
                found[number] = (path + min(log_prob, 0.0), token)
    return found


def all_nodes(log_probs: Tensor, tokens: Tensor, origins: Tensor) -> dict[tuple[int, int], tuple]:
    """One request: weight, token and parent of every node, by slot and number of the child."""
    nodes: dict[tuple[int, int], tuple] = {}
    for slot in range(log_probs.shape[0]):
        if slot:
            above = [nodes.get((slot - 1, origin)) for origin in origins[slot].tolist()]
            paths = [-math.inf if node is None else node[0] for node in above]
        else:
            paths = [0.0] + [-math.inf] * (log_probs.shape[1] - 1)
        for number, (path, token) in children(paths, log_probs[slot], tokens[slot]).items():
            origin = int(origins[slot, number // log_probs.shape[2]])
            nodes[slot, number] = (path, token, (slot - 1, origin) if slot else None)
    return nodes


def expected_tree(log_probs: Tensor, tokens: Tensor, origins: Tensor, num_nodes: int) -> Tree:
    """One request, as the docstring has it."""
    nodes = all_nodes(log_probs, tokens, origins)
    chosen = sorted(nodes, key=lambda name: (-nodes[name][0], name))[:num_nodes]
    main: list[tuple[int, int]] = []
    while True:
        tip = main[-1] if main else None
        below = [name for name in chosen if nodes[name][2] == tip]
        if not below:
            break
        main.append(below[0])
    order = main + [name for name in chosen if name not in main]
    rows: dict = {None: 0} | {name: row for row, name in enumerate(order, start=1)}
    out, parents, depths, words = [-1], [0], [0], [1]
    for name in order:
        parent = rows[nodes[name][2]]
        words.append(words[parent] | 1 << len(out))
        out.append(nodes[name][1])
        parents.append(parent)
        depths.append(name[0] + 1)
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


def assert_is(found: Tree, log_probs: Tensor, tokens: Tensor, origins: Tensor) -> None:
    num_nodes = found.tokens.shape[1] - 1
    for request in range(len(log_probs)):
        lists = log_probs[request], tokens[request], origins[request]
        expected = expected_tree(*lists, num_nodes)
        for name in Tree._fields:
            one, other = getattr(found, name)[request], getattr(expected, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


@EACH
@pytest.mark.parametrize("follows_beam", [False, True], ids=["any rows", "a beam's rows"])
@pytest.mark.parametrize(
    ("slots", "beam", "candidates", "num_nodes"),
    [(1, 1, 1, 1), (8, 1, 1, 8), (1, 3, 16, 7), (4, 2, 3, 12), (3, 4, 5, 31), (8, 4, 8, 63),
     (64, 1, 1, 63), (9, 8, 16, 63)],
)  # fmt: skip
def test_keeps_the_best_nodes(
    slots: int,
    beam: int,
    candidates: int,
    num_nodes: int,
    follows_beam: bool,
    implementation: ModuleType,
    kernel_device: str,
) -> None:
    log_probs, tokens, origins = make_lists(3, slots, beam, candidates)
    if follows_beam:
        log_probs = log_probs.sort(-1, descending=True).values
        origins = beam_lists(log_probs, tokens)
    found = run(implementation, kernel_device, log_probs, tokens, origins, num_nodes)
    assert_is(found, log_probs, tokens, origins)


@EACH
def test_what_it_is_cut_to_is_a_tree_that_begins_with_the_main_chain(
    implementation: ModuleType, kernel_device: str
) -> None:
    log_probs, tokens, _ = make_lists(4, 6, 4, 8)
    log_probs = log_probs.sort(-1, descending=True).values
    tokens = torch.arange(tokens.numel()).view(tokens.shape)  # a token says where it is from
    origins = beam_lists(log_probs, tokens)
    found = run(implementation, kernel_device, log_probs, tokens, origins, 63)
    for request in range(4):
        parents, words = found.parents[request].tolist(), found.mask[request].tolist()
        assert all(parents[row] < row for row in range(1, 64))
        for row, word in enumerate(words):
            ancestors, node = {row}, row
            while node:
                node = parents[node]
                ancestors.add(node)
            assert {bit for bit in range(64) if word >> bit & 1} == ancestors
        # Lists are sorted here, so the best child is the first of its list.
        length = next(row for row in range(1, 64) if parents[row] != row - 1) - 1
        assert length >= 1
        for row in range(1, length + 1):
            assert int(found.tokens[request, row]) % 8 == 0
            assert found.depths[request, row] == row
        below = [row for row in range(1, 64) if parents[row] == length]
        assert not below, "the main chain goes on"


@EACH
def test_a_tree_that_runs_out_of_nodes(implementation: ModuleType, kernel_device: str) -> None:
    """Padded candidates, useless weights, dead rows, and a request without any candidate."""
    log_probs, tokens, _ = make_lists(3, 3, 2, 3)
    log_probs[0, 1, 0] = torch.tensor([-math.inf, math.nan, math.inf])
    tokens[0, 0, 0, 1] = -1
    tokens[1] = -1
    origins = torch.tensor([[0, 1], [0, 1], [3, 5]]).repeat(3, 1, 1)
    origins[2, 1, 1], origins[2, 2, 0] = -1, 6
    found = run(implementation, kernel_device, log_probs, tokens, origins, 40)
    # Of the first: both rows of slot 1 are dead, one by its candidates, one by its origin.
    assert (found.tokens >= 0).sum(-1).tolist() == [2, 0, 3 + 3]
    assert_is(found, log_probs, tokens, origins)
    assert found.depths[1].tolist() == [0] + [1] * 40
    assert found.mask[1].tolist() == [1 << row for row in range(41)]


@EACH
def test_equal_paths(implementation: ModuleType, kernel_device: str) -> None:
    """Weights of 0, or above, tie everything: by slot, row and candidate, after the main chain."""
    log_probs, tokens = torch.zeros(1, 2, 2, 3), torch.arange(12).view(1, 2, 2, 3)
    log_probs[0, 1, 0, 1], log_probs[0, 1, 1, 2] = -0.0, 7.0
    origins = torch.tensor([[[9, 9], [1, 0]]])
    found = run(implementation, kernel_device, log_probs, tokens, origins, 8)
    assert found.tokens.tolist() == [[-1, 0, 9, 1, 2, 6, 7, 8, 10]]
    assert found.parents.tolist() == [[0, 0, 1, 0, 0, 3, 3, 3, 1]]


def test_rounded_sums_agree(kernel_device: str) -> None:
    """Sums that round: both add in the same order, so that near ties fall alike."""
    shape = (4, 6, 3, 4)
    log_probs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = torch.arange(log_probs.numel()).view(shape)
    origins = beam_lists(log_probs, tokens)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lists = log_probs.to(dtype), tokens, origins
        trees = [run(each, kernel_device, *lists, 24) for each in IMPLEMENTATIONS]
        assert all(torch.equal(*pair) for pair in zip(*trees, strict=True))
    double = reference.select_tree(log_probs.double(), tokens, origins, 24)
    single = reference.select_tree(log_probs, tokens, origins, 24)
    assert torch.equal(double.tokens, single.tokens)


def test_no_requests(kernel_device: str) -> None:
    for implementation in IMPLEMENTATIONS:
        lists = make_lists(0, 2, 2, 2)
        found = run(implementation, kernel_device, *lists, 5)
        assert all(tensor.shape == (0, 6) for tensor in found)
        beam = implementation.extend_beam(lists[0][:, 0], lists[1][:, 0], None, 3)
        assert all(tensor.shape == (0, 3) for tensor in beam)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_candidates(data: st.DataObject, kernel_device: str) -> None:
    shape = tuple(data.draw(st.integers(1, limit)) for limit in (2, 5, 3, 6))
    size = math.prod(shape)
    weights = st.sampled_from([0.0, -0.5, -0.75, -3.0, -math.inf, math.nan])
    log_probs = torch.tensor(data.draw(st.lists(weights, min_size=size, max_size=size)))
    names = st.lists(st.integers(-1, 9), min_size=size, max_size=size)
    tokens = torch.tensor(data.draw(names)).view(shape)
    seed, num_nodes = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 20))
    lists = log_probs.view(shape), tokens, make_lists(*shape, seed)[2]
    for implementation in IMPLEMENTATIONS:
        assert_is(run(implementation, kernel_device, *lists, num_nodes), *lists)


def assert_is_beam(found: Beam, log_probs: Tensor, tokens: Tensor, paths: Tensor | None) -> None:
    """Against plain loops over one slot's children."""
    for request in range(len(log_probs)):
        above = [0.0] + [-math.inf] * (log_probs.shape[1] - 1)
        above = above if paths is None else paths[request].tolist()
        all_children = children(above, log_probs[request], tokens[request])
        order = sorted(all_children, key=lambda number: (-all_children[number][0], number))
        width = found.tokens.shape[1]
        dead = [(-math.inf, 0)] * max(0, width - len(order))
        expected = [all_children[number] for number in order[:width]] + dead
        assert found.origins[request].tolist() == order[:width] + [-1] * len(dead)
        assert found.paths[request].tolist() == [path for path, _ in expected]
        assert found.tokens[request].tolist() == [token for _, token in expected]


@EACH
@pytest.mark.parametrize("width", [1, 4, 8])
def test_beam(width: int, implementation: ModuleType, kernel_device: str) -> None:
    log_probs, tokens, _ = make_lists(3, 2, 4, 3)
    log_probs[1, 1, 2] = torch.tensor([-math.inf, math.nan, 1.0])
    tokens[2] = -1
    found: Beam | None = None
    for slot in range(2):
        paths = None if found is None else found.paths[:, :4].contiguous()
        if paths is not None and paths.shape[1] < 4:
            paths = torch.nn.functional.pad(paths, (0, 3), value=-math.inf)
        lists = log_probs[:, slot], tokens[:, slot], paths
        moved = [None if tensor is None else tensor.to(kernel_device) for tensor in lists]
        found = Beam(*(tensor.cpu() for tensor in implementation.extend_beam(*moved, width)))
        assert_is_beam(found, *lists)


@EACH
def test_beam_over_a_list_that_all_rows_share(
    implementation: ModuleType, kernel_device: str
) -> None:
    log_probs, tokens, _ = make_lists(2, 1, 1, 5)
    lists = log_probs[:, 0].expand(-1, 3, -1), tokens[:, 0].expand(-1, 3, -1)
    paths = torch.tensor([[0.0, -1.0, -math.inf], [-0.5, -0.25, -2.0]])
    moved = [tensor.to(kernel_device) for tensor in (*lists, paths)]
    found = Beam(*(tensor.cpu() for tensor in implementation.extend_beam(*moved, 4)))
    assert_is_beam(found, *lists, paths)


@EACH
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_paths(
    implementation: ModuleType, kernel_device: str
) -> None:
    """Lists that all rows of a slot share: every path through them is a node that may be taken."""
    slots, candidates, n = 4, 3, 8
    log_probs, tokens, _ = make_lists(2, slots, 1, candidates)
    lists = [tensor.expand(-1, -1, n, -1).contiguous() for tensor in (log_probs, tokens)]
    origins = beam_lists(*lists)
    found = run(implementation, kernel_device, *lists, origins, n)
    for request in range(2):
        sums = [0.0]
        best: list[float] = []
        for slot in range(slots):
            sums = [above + own for above in sums for own in log_probs[request, slot, 0].tolist()]
            best += sums
        kept = []
        for row in range(1, n + 1):
            path, node = 0.0, row
            while node:
                slot = int(found.depths[request, node]) - 1
                same = tokens[request, slot, 0] == found.tokens[request, node]
                path += float(log_probs[request, slot, 0, same.int().argmax()])
                node = int(found.parents[request, node])
            kept.append(path)
        assert sorted(kept, reverse=True) == sorted(best, reverse=True)[:n]


def generate(
    implementation: ModuleType, device: str, seed: int, num_nodes: int
) -> tuple[list[int], int]:
    """24 tokens of a toy target by coupled verification, and the steps that took.

    The target's logits depend on the two last tokens; the draft knows the last alone.
    """
    slots, beam, vocabulary, temperature, prompt = 3, 2, 20, 0.6, [3, 7]
    generator = torch.Generator().manual_seed(0)
    tables = 1.5 * torch.randn(2, vocabulary, vocabulary, generator=generator)

    def target(text: list[int]) -> Tensor:
        return tables[0, text[-1]] + tables[1, text[-2]]

    heat, seeds = torch.tensor([temperature]), torch.tensor([seed])
    text, steps = list(prompt), 0
    while len(text) < len(prompt) + 24:
        root, paths, tree = len(text) - 1, [text], None
        if num_nodes:
            log_probs, tokens, origins = [], [], [torch.zeros(1, beam, dtype=torch.int64)]
            previous, sums = torch.tensor([[text[-1]]]), None
            for slot in range(slots):
                candidates = tree_candidates(
                    torch.zeros(1, vocabulary),
                    tables[0, previous],
                    3,
                    temperature=heat,
                    seeds=seeds,
                    positions=torch.tensor([root + slot]),
                )
                tokens.append(candidates.tokens.expand(-1, beam, -1))
                log_probs.append(candidates.log_probs.expand(-1, beam, -1))
                extended = reference.extend_beam(log_probs[-1], tokens[-1], sums, beam)
                previous, sums = extended.tokens, extended.paths
                origins.append(extended.origins)
            lists = [torch.stack(each, 1) for each in (log_probs, tokens, origins[:-1])]
            tree = run(implementation, device, *lists, num_nodes)
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
            temperature=heat,
            seeds=seeds,
            positions=torch.tensor([root]) if tree is None else root + tree.depths[0].long(),
        )
        text += verified.tokens[0, : int(verified.num_tokens[0])].tolist()
        steps += 1
    return text[len(prompt) : len(prompt) + 24], steps


@EACH
@pytest.mark.parametrize("seed", [5, 2**40 + 1])
def test_a_coupled_text_does_not_depend_on_the_tree(
    seed: int, implementation: ModuleType, kernel_device: str
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


@pytest.mark.parametrize("widths", [[2, 0], [64], [8, 8]])
def test_fixed_tree_refuses(widths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^widths: expected"):
        fixed_tree(widths)


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_probs", torch.zeros(3, 2, 2)),
        ("log_probs", torch.zeros(3, 0, 2, 2)),
        ("log_probs", torch.zeros(3, 65, 2, 2)),
        ("log_probs", torch.zeros(3, 4, 9, 2)),
        ("log_probs", torch.zeros(3, 4, 2, 17)),
        ("log_probs", torch.zeros(3, 4, 2, 3, dtype=torch.int64)),
        ("log_probs", torch.zeros(3, 4, 3, 2).mT),
        ("tokens", torch.zeros(3, 4, 2, 2, dtype=torch.int64)),
        ("tokens", torch.zeros(3, 4, 2, 3, dtype=torch.int32)),
        ("tokens", torch.zeros(3, 4, 3, 2, dtype=torch.int64).mT),
        ("origins", torch.zeros(3, 4, 3, dtype=torch.int64)),
        ("origins", torch.zeros(3, 4, 2, dtype=torch.int32)),
        ("origins", torch.zeros(3, 2, 4, dtype=torch.int64).mT),
        ("num_nodes", 0),
        ("num_nodes", 64),
    ],
)
def test_refuses_arguments(name: str, value: object, implementation: ModuleType) -> None:
    arguments = {
        "log_probs": torch.zeros(3, 4, 2, 3),
        "tokens": torch.zeros(3, 4, 2, 3, dtype=torch.int64),
        "origins": torch.zeros(3, 4, 2, dtype=torch.int64),
        "num_nodes": 5,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.select_tree(**(arguments | {name: value}))


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_probs", torch.zeros(3, 2)),
        ("log_probs", torch.zeros(3, 3, 2).mT),
        ("tokens", torch.zeros(3, 2, 2, dtype=torch.int64)),
        ("tokens", torch.zeros(3, 3, 2, dtype=torch.int64).mT),
        ("paths", torch.zeros(3, 3)),
        ("paths", torch.zeros(3, 2, dtype=torch.int64)),
        ("paths", torch.zeros(2, 3).mT),
        ("width", 0),
        ("width", 9),
    ],
)
def test_beam_refuses_arguments(name: str, value: object, implementation: ModuleType) -> None:
    arguments = {
        "log_probs": torch.zeros(3, 2, 3),
        "tokens": torch.zeros(3, 2, 3, dtype=torch.int64),
        "paths": torch.zeros(3, 2),
        "width": 4,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.extend_beam(**(arguments | {name: value}))


def test_kernels_refuse_float64() -> None:
    log_probs, tokens, origins = make_lists(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"^log_probs: "):
        triton_kernel.select_tree(log_probs.double(), tokens, origins, 3)
    with pytest.raises(ValueError, match=r"^log_probs: "):
        triton_kernel.extend_beam(log_probs[:, 0].double(), tokens[:, 0], None, 3)
