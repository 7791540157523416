"""Verification: the kernels decide what the reference decides, token by token.

That the rules are exact is shown of the reference in test_verify_exact.py. Probabilities in float32
agree to about 1e-6, so that a test or a draw comes out otherwise once in a million: with fixed
seeds, equality is asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import aot
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.verify import Verification, launch, reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from support.verify_toys import Batch, distinct, fixed_model, independent, random_draw, toy_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (5, 0, 1, 9, 4, 6)
TEMPERATURES = (1.0, 0.7, 1e-6, 1.3, 0.0, 0.5)
TREE_RULES = ("greedy", "coupled", "rejection", "rejection_with_replacement")
RULES = (*TREE_RULES, "block")


@dataclass
class Arguments:
    """One call's arguments."""

    logits: Tensor
    tokens: Tensor
    row_start_loc: Tensor
    max_rows: int
    rule: str
    parents: Tensor | None
    temperature: Tensor | None
    seeds: Tensor | None
    positions: Tensor | None
    draft_logits: Tensor | None
    draft_rows: Tensor | None
    max_children: int | None

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> Arguments:
        moved = {
            name: value.to(device)
            for name, value in self.as_dict().items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def without_proposals(self) -> Arguments:
        return replace(self, draft_logits=None, draft_rows=None)


# NumPy, which the interpreter computes with, warns of what the kernels expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks to a row of 65 tokens."""
    monkeypatch.setattr(launch, "CHUNK", 64)


def random_parents(length: int, generator: torch.Generator) -> list[int]:
    """Mostly bushy: a node hangs below one of the four before it."""
    return [0] + [
        int(torch.randint(max(0, node - 4), node, (), generator=generator))
        for node in range(1, length)
    ]


def make_arguments(
    rule: str,
    lengths: Sequence[int] = LENGTHS,
    vocab_size: int = 65,
    is_tree: bool = False,
    dtype: torch.dtype = torch.float32,
    temperatures: Sequence[float] = TEMPERATURES,
    parents: Sequence[Sequence[int]] | None = None,
    seed: int = 42,
) -> Arguments:
    """Ragged requests with forbidden tokens and placeholders, then two rows of no request.

    The nodes of a depth share a proposal, as SpecFormer's slots do.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, padding = sum(lengths), 2
    if parents is None and is_tree:
        parents = [random_parents(length, generator) if length else [] for length in lengths]
    # Rows wider than the vocabulary, as in a padded lm_head.
    logits = torch.randn(num_rows + padding, vocab_size + 7, generator=generator) * 4
    proposals = logits + torch.randn(logits.shape, generator=generator)
    is_forbidden = torch.rand(logits.shape, generator=generator) < 0.1
    logits[:, 1:][is_forbidden[:, 1:]] = -math.inf
    logits, proposals = (rows[:, :vocab_size].to(dtype) for rows in (logits, proposals))
    starts = [0, *itertools.accumulate(lengths)]
    # Proposals are stored in another order than the rows that use them.
    order = torch.randperm(num_rows + padding, generator=generator)
    draft_rows = order.clone()
    tokens = torch.full((num_rows + padding,), 10**9)
    depths = torch.zeros(num_rows + padding, dtype=torch.int64)
    for request, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        temperature = max(temperatures[request % len(temperatures)], 0.3)
        for node in range(1, length):
            above = start + (parents[request][node] if parents else node - 1)
            depth = int(depths[above])
            draft_rows[above] = order[start + depth]
            depths[start + node] = depth + 1
            chances = (proposals[start + depth].float() / temperature).softmax(-1)
            tokens[start + node] = chances.multinomial(1, generator=generator)
            if torch.rand((), generator=generator) < 0.05:
                tokens[start + node] = -1
    draft_logits = torch.empty_like(proposals)
    draft_logits[order] = proposals
    flat = [above for one in parents for above in one] + [0] * padding if parents else None
    requests = len(lengths)
    return Arguments(
        logits=logits,
        tokens=tokens,
        row_start_loc=torch.tensor(starts, dtype=torch.int32),
        max_rows=max(1, *lengths),
        rule=rule,
        parents=None if flat is None else torch.tensor(flat, dtype=torch.int32),
        temperature=torch.tensor(
            [temperatures[r % len(temperatures)] for r in range(requests)], dtype=torch.float32
        ),
        seeds=torch.randint(-(2**62), 2**62, (requests,), generator=generator),
        positions=depths + 1000,
        draft_logits=draft_logits,
        draft_rows=draft_rows,
        max_children=4,
    )


def assert_equal(found: Verification, expected: Verification) -> None:
    for name in Verification._fields:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs), f"{name}: {ours} is not {theirs}"


def check_kernel(args: Arguments, device: str) -> Verification:
    expected = reference.verify(**args.as_dict())
    assert_equal(launch.verify(**args.to(device).as_dict()), expected)
    return expected


@pytest.mark.parametrize("is_drawn", [True, False], ids=["drawn", "one_hot"])
@pytest.mark.parametrize("rule", RULES)
def test_chains(rule: str, is_drawn: bool, kernel_device: str) -> None:
    args = make_arguments(rule)
    expected = check_kernel(args if is_drawn else args.without_proposals(), kernel_device)
    assert expected.num_tokens[1] == 0
    assert expected.num_tokens.max() > 2


@pytest.mark.parametrize("is_drawn", [True, False], ids=["drawn", "one_hot"])
@pytest.mark.parametrize("rule", TREE_RULES)
def test_trees(rule: str, is_drawn: bool, kernel_device: str) -> None:
    args = make_arguments(rule, is_tree=True, seed=7)
    expected = check_kernel(args if is_drawn else args.without_proposals(), kernel_device)
    assert expected.num_tokens.max() > 2


@pytest.mark.parametrize("vocab_size", [1, 3, 63, 64, 1000])
@pytest.mark.parametrize("rule", ["coupled", "rejection", "block"])
def test_vocabularies(
    rule: str, vocab_size: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CHUNK", 256)
    check_kernel(make_arguments(rule, (4, 2), vocab_size, seed=vocab_size), kernel_device)


@pytest.mark.parametrize("rule", RULES)
def test_one_token_past_a_chunk(
    rule: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert launch.CHUNK == 4096
    check_kernel(make_arguments(rule, (3, 2), 4097), kernel_device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_low_precision(rule: str, dtype: torch.dtype, kernel_device: str) -> None:
    is_tree = rule != "block"
    args = make_arguments(rule, (4, 3), is_tree=is_tree, dtype=dtype, temperatures=(1.0, 0.0))
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("max_children", [1, 2, 5])
@pytest.mark.parametrize("rule", ["rejection", "rejection_with_replacement"])
def test_many_siblings(rule: str, max_children: int, kernel_device: str) -> None:
    """All of them tried, some repeat a token, and the second request rejects through two levels."""
    lengths = (1 + max_children, 1 + max_children, 2 + max_children)
    parents = [[0] * length for length in lengths]
    parents[2][-1] = 1
    args = make_arguments(rule, lengths, parents=parents, temperatures=(1.0,), seed=max_children)
    args.max_children = max_children
    drafts = args.tokens[1:-2]
    args.tokens[2:4] = args.tokens[1]
    args.logits[:, drafts[(drafts >= 0) & (drafts < 65)]] -= 4.0
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("is_tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_most_rows(rule: str, is_tree: bool, kernel_device: str) -> None:
    """65 rows: all of them accepted, and a tree whose rows do not fit a word."""
    args = make_arguments(rule, (65,), vocab_size=20, is_tree=is_tree, temperatures=(0.5,))
    if not is_tree:
        args.tokens[1:65] = torch.arange(64) % 20
        args.logits[torch.arange(64), args.tokens[1:65]] = 50.0
        args.draft_logits = torch.zeros_like(args.draft_logits)
    expected = check_kernel(args, kernel_device)
    assert is_tree or expected.num_tokens == 65


def test_first_of_equal_logits(kernel_device: str) -> None:
    """Ties within a chunk and between chunks, and between siblings."""
    args = make_arguments("greedy", (3,), parents=[[0, 0, 0]])
    args.logits = torch.zeros(5, 65)
    args.logits[0, [40, 41, 64]] = 1.0
    args.tokens[1:3] = 40
    expected = check_kernel(args, kernel_device)
    assert expected.tokens.tolist() == [[40, 0, -1]]
    assert expected.rows.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("rule", RULES)
def test_certain_distributions(rule: str, kernel_device: str) -> None:
    """p one-hot, at a tiny temperature too; q one-hot on the draft, and 0 at it."""
    args = make_arguments(rule, (5, 5, 5), temperatures=(1.0, 1e-6, 1e-30), vocab_size=40)
    args.tokens[1:15] = torch.arange(14) + 3
    tokens = args.tokens[1:15]
    args.logits[torch.arange(14), tokens] = 30.0
    args.logits[0] = -math.inf
    args.logits[0, tokens[0]] = -5.0
    args.draft_rows = torch.arange(17)
    args.draft_logits = torch.zeros(17, 40)
    args.draft_logits[1] = -math.inf
    args.draft_logits[1, tokens[1]] = 2.0
    args.draft_logits[6, tokens[6]] = -math.inf
    args.draft_logits[11, tokens[11]] = 30.0
    expected = check_kernel(args, kernel_device)
    if rule in ("rejection", "rejection_with_replacement", "block"):
        assert expected.num_tokens[1] == 2
    assert expected.num_tokens[0] > 2


@pytest.mark.parametrize("rule", RULES)
def test_bad_target_logits_are_reported(rule: str, kernel_device: str) -> None:
    """In a visited row, that is: the last request's bad row is behind a rejected draft."""
    lengths = (3, 3, 3, 3, 3, 3)
    for temperature in (1.0, 0.0):
        args = make_arguments(rule, lengths, temperatures=(temperature,), vocab_size=40)
        args.tokens[:18] = torch.arange(18) % 3
        args.logits = args.logits.clamp(min=-2.0)
        args.logits[torch.arange(17), args.tokens[1:18]] = 60.0
        args.draft_logits = torch.zeros_like(args.draft_logits)
        args.logits[0, 39] = math.nan
        args.logits[4, 0] = math.nan
        args.logits[8, :] = -math.inf
        args.logits[9, 33] = math.inf
        args.logits[15] = 0.0
        args.logits[15, 30] = 60.0
        args.logits[16] = math.nan
        expected = check_kernel(args, kernel_device)
        last = 0 if rule == "block" and temperature else 1
        assert expected.num_tokens.tolist() == [0, 0, 0, 0, 3, last]
        assert (expected.rows[0] == -1).all()


@pytest.mark.parametrize("rule", ["rejection", "rejection_with_replacement", "block"])
def test_bad_proposals_propose_nothing(rule: str, kernel_device: str) -> None:
    args = make_arguments(rule, (4, 4, 4, 4, 4, 4), temperatures=(1.0,), vocab_size=40)
    args.draft_rows = torch.arange(len(args.tokens), dtype=torch.int32)
    args.draft_logits[1, 5] = math.nan
    args.draft_logits[4, 5] = math.inf
    args.draft_logits[9] = -math.inf
    args.draft_rows[12] = len(args.tokens)
    args.draft_rows[17] = -1
    args.tokens[21] = 40
    args.tokens = args.tokens.int()
    expected = check_kernel(args, kernel_device)
    assert (expected.num_tokens > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_requests_do_not_see_each_other(rule: str, kernel_device: str) -> None:
    args = make_arguments(rule, (5, 3, 4), vocab_size=40, is_tree=rule != "block").to(kernel_device)
    together = launch.verify(**args.as_dict())
    one = slice(5, 8)
    alone = launch.verify(
        **replace(
            args,
            logits=args.logits[one],
            tokens=args.tokens[one],
            row_start_loc=torch.tensor([0, 3], dtype=torch.int32, device=kernel_device),
            parents=args.parents[one] if args.parents is not None else None,
            temperature=args.temperature[1:2],
            seeds=args.seeds[1:2],
            positions=args.positions[one],
            draft_rows=args.draft_rows[one],
        ).as_dict()
    )
    count = int(alone.num_tokens)
    assert count == together.num_tokens[1]
    assert torch.equal(alone.tokens[0, :count], together.tokens[1, :count])
    assert torch.equal(alone.rows[0, :count] + 5, together.rows[1, :count])


def test_strided_arguments(kernel_device: str) -> None:
    args = make_arguments("rejection", is_tree=True)
    spread = {
        name: torch.stack((value, value), 1)[:, 0]
        for name, value in args.as_dict().items()
        if isinstance(value, Tensor) and value.dim() == 1
    }
    check_kernel(replace(args, **spread), kernel_device)


def test_loose_bound_and_bounds_that_run_backwards(kernel_device: str) -> None:
    """Rows past max_rows do not exist either."""
    args = make_arguments("rejection", (4, 9, 3))
    check_kernel(replace(args, max_rows=12), kernel_device)
    check_kernel(replace(args, max_rows=5), kernel_device)
    backwards = torch.tensor([0, 4, 2, 5], dtype=torch.int32)
    check_kernel(replace(args, row_start_loc=backwards), kernel_device)


@pytest.mark.parametrize("rule", ["coupled", "rejection", "block"])
def test_nothing_to_verify(rule: str, kernel_device: str) -> None:
    none = make_arguments(rule, (0, 0))
    check_kernel(none, kernel_device)
    no_rows = {
        name: value[:0]
        for name, value in none.as_dict().items()
        if name in ("logits", "tokens", "positions", "draft_logits", "draft_rows")
    }
    check_kernel(replace(none, **no_rows), kernel_device)
    start = torch.zeros(1, dtype=torch.int32)
    empty = replace(none, row_start_loc=start, temperature=torch.zeros(0), seeds=none.seeds[:0])
    assert check_kernel(empty, kernel_device).tokens.shape == (0, 1)


@pytest.mark.parametrize("rule", ["coupled", "block", "rejection"])
def test_rows_past_int32_elements(rule: str, kernel_device: str) -> None:
    """Row * stride passes 2**31. Pages that nothing touches take no memory."""
    if kernel_device == "cuda":
        pytest.skip("a GPU backs every page: the interpreter's addresses stand for both")
    args = make_arguments(rule, (4,), is_tree=rule == "rejection", vocab_size=40)
    stride, first = 2**26, 33

    def far(rows: Tensor, offset: int) -> Tensor:
        # Not torch.empty, whose poison would touch every page.
        storage = torch.UntypedStorage((offset + len(rows)) * stride * rows.element_size())
        memory = torch.tensor([], dtype=rows.dtype).set_(storage)
        spread = memory.as_strided((offset + len(rows), rows.shape[1]), (stride, 1))
        spread[offset:] = rows
        return spread

    def shifted(rows: Tensor) -> Tensor:
        return torch.cat((torch.zeros(first, dtype=rows.dtype), rows))

    moved = replace(
        args,
        logits=far(args.logits, first),
        tokens=shifted(args.tokens),
        row_start_loc=args.row_start_loc + first,
        parents=shifted(args.parents) if args.parents is not None else None,
        positions=shifted(args.positions),
        draft_logits=far(args.draft_logits, first),
        draft_rows=shifted(args.draft_rows + first),
    )
    near = check_kernel(args, kernel_device)
    result = launch.verify(**moved.as_dict())
    assert torch.equal(result.tokens, near.tokens)
    assert torch.equal(result.rows, torch.where(near.rows < 0, near.rows, near.rows + first))


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), rule=st.sampled_from(TREE_RULES), seed=st.integers(0, 2**20))
def test_random_trees(data: st.DataObject, rule: str, seed: int, kernel_device: str) -> None:
    """Any parents, also such that no tree has, which leave a row unreachable."""
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
    parents = [
        [0] + [data.draw(st.integers(max(-1, node - 4), node - 1)) for node in range(1, length)]
        for length in lengths
    ]
    vocab_size = data.draw(st.sampled_from([2, 7, 40]))
    args = make_arguments(
        rule,
        lengths,
        vocab_size,
        parents=[one[:length] for one, length in zip(parents, lengths, strict=True)],
        temperatures=data.draw(st.permutations([0.0, 1.0, 0.6])),
        seed=seed,
    )
    args.max_children = 6
    is_drawn = data.draw(st.booleans())
    check_kernel(args if is_drawn else args.without_proposals(), kernel_device)


@pytest.mark.parametrize("is_tree", [False, True], ids=["chain", "tree"])
def test_follow(is_tree: bool, kernel_device: str) -> None:
    """The walk alone, behind a sampler that is not ours; a negative token is a bad row."""
    args = make_arguments("greedy", is_tree=is_tree, vocab_size=3)
    sampled = args.logits.argmax(-1)
    for changed in (sampled, torch.where(torch.arange(len(sampled)) % 7 == 0, -1, sampled)):
        call = (changed, args.tokens, args.row_start_loc, args.max_rows, args.parents)
        moved = [value.to(kernel_device) if isinstance(value, Tensor) else value for value in call]
        assert_equal(launch.follow(*moved), reference.follow(*call))
    walked = reference.follow(sampled, *call[1:])
    assert_equal(walked, reference.verify(**args.as_dict()))


@pytest.mark.parametrize(
    ("rule", "widths", "candidates", "is_drawn"),
    [
        ("rejection", (4,), distinct, True),
        ("rejection", (1, 1), distinct, False),
        ("rejection_with_replacement", (4,), independent, True),
        ("block", (1, 1, 1), distinct, True),
    ],
)
def test_many_seeds(
    rule: str, widths: tuple[int, ...], candidates: Any, is_drawn: bool, kernel_device: str
) -> None:
    """Small vocabularies, where every draft's fate comes up, and every rejected token again."""
    requests = 48
    batch = Batch(toy_model(8, seed=1), toy_model(8, seed=2), widths, candidates)
    for request in range(requests):
        batch.add((), random_draw(request))
    arguments = {"draft_logits": None, "draft_rows": None, "max_children": None}
    arguments |= batch.arguments(one_hot=not is_drawn)
    args = Arguments(**arguments, rule=rule, seeds=torch.arange(requests) - 20)
    expected = check_kernel(args, kernel_device)
    assert set(expected.num_tokens.tolist()) == set(range(1, len(widths) + 2))


@pytest.mark.parametrize("rule", ["rejection", "rejection_with_replacement"])
def test_residual_after_all_siblings(rule: str, kernel_device: str) -> None:
    """Both drafts are impossible; how often q is then off p decides between the other tokens."""
    target, draft = fixed_model([0.0, 0.0, 0.7, 0.3]), fixed_model([0.6, 0.2, 0.19, 0.01])
    batch = Batch(target, draft, (2,), lambda *_: [0, 1])
    for request in range(24):
        batch.add((), random_draw(request))
    args = Arguments(**batch.arguments(), rule=rule, seeds=torch.arange(24))
    assert set(check_kernel(args, kernel_device).tokens[:, 0].tolist()) == {2, 3}


def test_noise_lost_to_rounding(kernel_device: str) -> None:
    """At a tiny temperature float32 scores tie where the noise alone would tell tokens apart."""
    args = make_arguments("coupled", (1,) * 12, vocab_size=40, temperatures=(1e-6,))
    args.logits = torch.full((14, 40), 50.0)
    expected = check_kernel(args, kernel_device)
    exact = reference.verify(**replace(args, logits=args.logits.double()).as_dict())
    assert not torch.equal(expected.tokens, exact.tokens)


def test_draw_from_p_where_nothing_is_left(kernel_device: str) -> None:
    """Rounding alone brings this about, so it is set up by hand: q is taken far too often."""
    args = make_arguments("rejection", (1, 1), temperatures=(0.8, 1.1)).to(kernel_device)
    proposals = args.draft_logits[args.draft_rows]
    largest = torch.stack((args.logits[:2].amax(1), proposals[:2].amax(1), torch.full((2,), 1e30)))
    empty = launch._empty_result(args.row_start_loc, 1)
    num_chunks = 2
    arguments = {
        "out_tokens_ptr": empty.tokens,
        "num_tokens_ptr": torch.ones_like(empty.num_tokens),
        "draw_best_ptr": torch.empty(2, num_chunks, device=kernel_device),
        "draw_winners_ptr": torch.empty(2, num_chunks, dtype=torch.int32, device=kernel_device),
        "draw_rows_ptr": torch.arange(2, device=kernel_device),
        "draw_weights_ptr": largest.T.contiguous(),
        "BLOCK_C": num_chunks,
        "IS_COUPLED": False,
    }
    for name, value in args.as_dict().items():
        arguments |= {f"{name}_ptr": value, name: value}
    arguments |= launch._logits_arguments(args.logits, args.draft_logits)
    launch._launch(launch._draw_kernel, (num_chunks, 2), arguments)
    assert (arguments["draw_best_ptr"] == -math.inf).all()
    launch._launch(launch._last_kernel, (2,), arguments)
    assert torch.equal(empty.tokens.cpu(), reference.verify(**args.to("cpu").as_dict()).tokens)


@pytest.mark.parametrize(
    ("rule", "is_tree", "is_drawn", "launches"),
    [
        ("greedy", True, True, 2),
        ("coupled", True, True, 2),
        ("rejection", False, True, 4),
        ("rejection", True, False, 4),
        ("rejection", True, True, 8),
        ("rejection_with_replacement", True, True, 8),
        ("block", False, False, 4),
        ("block", False, True, 6),
    ],
)
def test_launches(rule: str, is_tree: bool, is_drawn: bool, launches: int) -> None:
    """As few as the rule needs, known without a look at the tensors' values."""
    args = make_arguments(rule, is_tree=is_tree)
    args = args if is_drawn else args.without_proposals()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in args.as_dict().items()
        }
        found = aot.launches_of(lambda: launch.verify(**fake))
    assert len(found) == launches


def test_launchers_check_their_arguments() -> None:
    """With the reference's own checks, which test_verify_reference.py goes through."""
    args = make_arguments("rejection", is_tree=True)
    with pytest.raises(ValueError, match=r"^max_children: expected"):
        launch.verify(**args.as_dict() | {"max_children": None})
    with pytest.raises(ValueError, match=r"^sampled: expected"):
        launch.follow(args.logits, args.tokens, args.row_start_loc, args.max_rows)
    for name in ("logits", "draft_logits"):
        with pytest.raises(ValueError, match=f"^{name}: .* float32"):
            launch.verify(**args.as_dict() | {name: getattr(args, name).double()})
