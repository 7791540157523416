"""Block attention: kernel and reference against each other and against a loop over rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import aot
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.block_attention import launch, reference
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

# Largest RMS error over RMS of the float64 result, for inputs already rounded to the dtype.
# float32: sums of at most a few hundred terms keep the error near one rounding, 6e-8.
# float16: weights and output are rounded once each, 2**-12 in RMS; times three.
# bfloat16: the interpreter truncates weights and output where a GPU rounds, 2**-8 at most each.
ERROR_RATIO = {torch.float32: 1e-6, torch.float16: 7.5e-4, torch.bfloat16: 8e-3}


@dataclass
class Arguments:
    """One call's arguments, in the operation's order."""

    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    block_start_loc: Tensor
    block_mask: Tensor
    scale: float
    max_block_len: int
    pages_per_block: int = 1
    window: int = 0
    sinks: int = 0

    def as_dict(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, target: str | torch.dtype) -> Arguments:
        """Move tensors to a device, or cast the floating point ones; keeps the cache's strides."""
        changed = {
            name: tensor.to(target)
            for name, tensor in self.as_dict().items()
            if isinstance(tensor, Tensor)
            and (isinstance(target, str) or tensor.is_floating_point())
        }
        return replace(self, **changed)


def make_cache(shape: tuple[int, int, int, int], layout: str) -> Tensor:
    """NaN everywhere: what a request does not own must not matter."""
    blocks, heads, block_size, size = shape
    if layout == "heads_first":
        return torch.full((blocks, heads, block_size, size), math.nan)
    if layout == "tokens_first":
        return torch.full((blocks, block_size, heads, size), math.nan).permute(0, 2, 1, 3)
    # One layer of an allocation shared by several, each row padded.
    return torch.full((blocks, 3, heads, block_size, size + 16), math.nan)[:, 1, :, :, :size]


def make_words(kind: str, length: int, generator: torch.Generator) -> list[int]:
    if kind == "ones":
        words = [(1 << length) - 1] * length
    elif kind == "causal":
        words = [(1 << (row + 1)) - 1 for row in range(length)]
    elif kind == "zero":
        words = [0] * length
    elif kind == "diagonal_and_junk":  # bits past the block's own rows mean nothing
        words = [(1 << row) | (0b101 << length) for row in range(length)]
    else:
        words = []
        for row in range(length):  # a tree: each row sees itself and its parent's ancestors
            parent = int(torch.randint(-1, row, (), generator=generator)) if row else -1
            words.append((words[parent] if parent >= 0 else 0) | 1 << row)
    return [_signed(word) for word in words]


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def make_arguments(
    block_lens: Sequence[int],
    context_lens: Sequence[int],
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 16,
    mask: str = "ones",
    layout: str = "heads_first",
    max_block_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 42,
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_rows, num_requests = sum(block_lens), len(block_lens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 1
    kv_cache = make_cache((num_blocks, num_kv_heads, block_size, 2 * head_size), layout)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    # Two spare columns cut off: the row stride is wider than the table. Unused entries are junk.
    table = torch.full((num_requests, max(needed) + 3), 10**6, dtype=torch.int32)[:, :-2]
    for request, length in enumerate(context_lens):
        for index in range(needed[request]):
            block = order.pop()
            table[request, index] = block
            filled = min(block_size, length - index * block_size)
            kv_cache[block, :, :filled] = randn(num_kv_heads, filled, 2 * head_size)

    words = [word for length in block_lens for word in make_words(mask, length, generator)]
    # Query, key and value are views of one projection, as in a served model.
    fused = randn(num_rows, num_heads + 2 * num_kv_heads, head_size)
    query, key, value = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    return Arguments(
        query,
        key,
        value,
        kv_cache,
        table,
        torch.tensor(context_lens, dtype=torch.int32),
        torch.tensor([0, *block_lens]).cumsum(0).to(torch.int32),
        torch.tensor(words, dtype=torch.int64),
        head_size**-0.5,
        max_block_len or max(1, *block_lens),
    ).to(dtype)


def loop_over_rows(args: Arguments) -> Tensor:
    """The definition: for each row and head, one softmax over everything the row sees."""
    args = args.to(torch.float64)
    out = torch.zeros_like(args.query)
    group = args.query.shape[1] // args.key.shape[1]
    head_size, block_size = args.query.shape[2], args.kv_cache.shape[2]
    bounds = args.block_start_loc.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(bounds)):
        length = int(args.context_lens[request])
        cached = [
            args.kv_cache[args.block_table[request, token // block_size], :, token % block_size]
            for token in range(length)
            if not args.window or token < args.sinks or token >= length - args.window
        ]
        for row in range(start, end):
            word = int(args.block_mask[row])
            seen = [
                torch.cat((args.key[column], args.value[column]), -1)
                for column in range(start, end)
                if word >> (column - start) & 1
            ]
            if not cached and not seen:
                continue
            keys, values = torch.stack(cached + seen, dim=1).split(head_size, dim=-1)
            for head in range(args.query.shape[1]):
                scores = keys[head // group] @ args.query[row, head] * args.scale
                out[row, head] = scores.softmax(0) @ values[head // group]
    return out


def assert_close(found: Tensor, expected: Tensor, ratio: float) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all(), "an output element is unwritten or took in a foreign NaN"
    error, size = (found.cpu().double() - expected).norm().item(), expected.norm().item()
    assert error <= ratio * size, f"RMS error ratio {error / size:.3e}"


def check_kernel(args: Arguments, device: str) -> None:
    expected = reference.block_attention(**args.to(torch.float64).as_dict())
    found = launch.block_attention(**args.to(device).as_dict())
    assert found.dtype == args.query.dtype
    assert_close(found, expected, ERROR_RATIO[args.query.dtype])


CONTEXTS = (0, 1, 63, 65)
UNIFORM = (5, 5, 5, 5)
RAGGED = (1, 0, 8, 3)
MASKS = ("ones", "causal", "zero", "tree", "diagonal_and_junk")
LAYOUTS = ("heads_first", "tokens_first", "shared")
HEADS = ((4, 2), (3, 1), (8, 8))


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the launcher cut the batch's context into so many splits, of so many tokens at least."""

    def into(splits: int, least: int = 1) -> None:
        monkeypatch.setattr(launch, "target_splits", lambda *_: splits)
        monkeypatch.setattr(launch, "MIN_SPLIT_TOKENS", least)
        monkeypatch.setattr(launch, "COMBINE_SHARES", 2)  # the interpreter is slow

    return into


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_lens", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_reference_matches_the_definition(block_lens: tuple[int, ...], mask: str) -> None:
    args = make_arguments(block_lens, CONTEXTS, mask=mask, layout="tokens_first")
    expected = loop_over_rows(args)
    assert_close(reference.block_attention(**args.as_dict()), expected, 1e-6)
    assert_close(reference.block_attention(**args.to(torch.float64).as_dict()), expected, 1e-14)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
def test_reference_in_low_precision(dtype: torch.dtype) -> None:
    args = make_arguments(RAGGED, CONTEXTS, mask="tree", dtype=dtype)
    found = reference.block_attention(**args.as_dict())
    assert found.dtype == dtype
    assert_close(found, loop_over_rows(args), ERROR_RATIO[dtype])


def apart(args: Arguments) -> dict[str, Any]:
    """The context's K and V in memory of their own, as two layers of a narrower cache hold them."""
    sides = args.kv_cache.chunk(2, dim=-1)
    pages = (side.transpose(1, 2).contiguous().transpose(1, 2) for side in sides)
    return args.as_dict() | dict(zip(("kv_cache", "value_cache"), pages, strict=True))


@pytest.mark.parametrize("splits", [1, 5])
def test_values_apart(splits: int, split: Callable[..., None], kernel_device: str) -> None:
    split(splits)
    args = make_arguments(RAGGED, CONTEXTS)
    expected = loop_over_rows(args)
    found = launch.block_attention(**apart(args.to(kernel_device)))
    assert_close(found, expected, ERROR_RATIO[args.query.dtype])
    assert_close(reference.block_attention(**apart(args)), expected, 1e-6)


WINDOWS = ((1, 0), (7, 3), (60, 5), (64, 1), (1000, 1000))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_windows(
    window: int, sinks: int, splits: int, split: Callable[..., None], kernel_device: str
) -> None:
    """The first and the last tokens of a context are seen, and no page between them is read."""
    split(splits)
    args = make_arguments((5, 3, 1, 4), (0, 1, 65, 200), mask="tree")
    args = replace(args, window=window, sinks=sinks)
    expected = loop_over_rows(args)
    if window + sinks < 60:  # pages in the middle of the last request's context
        middle = args.block_table[3, 1 + sinks // 16 : (200 - window) // 16].long()
        args.kv_cache[middle] = math.nan
    assert_close(reference.block_attention(**args.as_dict()), expected, 1e-6)
    found = launch.block_attention(**args.to(kernel_device).as_dict())
    assert_close(found, expected, ERROR_RATIO[torch.float32])


@pytest.mark.parametrize(("window", "sinks"), [(-1, 0), (4, -1), (0, 4)])
def test_windows_that_make_no_sense(window: int, sinks: int) -> None:
    args = replace(make_arguments((1,), (5,)), window=window, sinks=sinks)
    with pytest.raises(ValueError, match="window, sinks: expected"):
        reference.block_attention(**args.as_dict())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_lens", [UNIFORM, RAGGED], ids=["uniform", "ragged"])
def test_masks(block_lens: tuple[int, ...], mask: str, kernel_device: str) -> None:
    check_kernel(make_arguments(block_lens, CONTEXTS, mask=mask), kernel_device)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_head_sizes_and_dtypes(head_size: int, dtype: torch.dtype, kernel_device: str) -> None:
    args = make_arguments((2, 3), (17, 65), head_size=head_size, mask="tree", dtype=dtype)
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("splits", [1, 2])
def test_largest_head(splits: int, split: Callable[..., None], kernel_device: str) -> None:
    split(splits)
    check_kernel(make_arguments((3,), (33,), head_size=256), kernel_device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_layouts(heads: tuple[int, int], block_size: int, layout: str, kernel_device: str) -> None:
    args = make_arguments(
        (2, 0, 4), (63, 1, 65), heads=heads, block_size=block_size, layout=layout, mask="causal"
    )
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("block_size", "heads"), [(64, (10, 2)), (128, (5, 5))], ids=str)
def test_large_pages_and_odd_groups(
    block_size: int,
    heads: tuple[int, int],
    splits: int,
    split: Callable[..., None],
    kernel_device: str,
) -> None:
    split(splits)
    check_kernel(
        make_arguments((2, 9), (129, 65), heads=heads, block_size=block_size, mask="tree"),
        kernel_device,
    )


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("pages", [2, 4])
def test_blocks_of_several_pages(
    pages: int, units: int, split: Callable[..., None], kernel_device: str
) -> None:
    """The table names blocks, the cache is cut into pages: page p of block b is b * pages + p."""
    split(units)
    whole = make_arguments((2, 9, 1), (193, 65, 0), block_size=64, mask="tree")
    cut = whole.kv_cache.unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1)
    args = replace(whole, kv_cache=cut, pages_per_block=pages)
    expected = loop_over_rows(whole)
    assert_close(reference.block_attention(**args.as_dict()), expected, 1e-6)
    found = launch.block_attention(**args.to(kernel_device).as_dict())
    assert_close(found, expected, ERROR_RATIO[torch.float32])


@pytest.mark.parametrize("mask", ["ones", "causal", "tree"])
def test_full_words_over_several_tiles(mask: str, kernel_device: str) -> None:
    """64 rows use the sign bit of the word, and with three heads each need several row tiles."""
    check_kernel(make_arguments((64, 7), (5, 0), heads=(3, 1), mask=mask), kernel_device)


def test_loose_bound_and_long_lens(kernel_device: str) -> None:
    args = make_arguments((2, 2), (40, 3), max_block_len=9)
    check_kernel(replace(args, context_lens=args.context_lens.long()), kernel_device)


def test_row_that_sees_nothing_is_zero(kernel_device: str) -> None:
    args = make_arguments((2, 1), (0, 0), mask="zero")
    for found in (
        reference.block_attention(**args.as_dict()),
        launch.block_attention(**args.to(kernel_device).as_dict()),
    ):
        assert torch.equal(found.cpu(), torch.zeros_like(args.query))


def test_no_rows(kernel_device: str) -> None:
    args = make_arguments((0, 0), (4, 0), max_block_len=4)
    assert reference.block_attention(**args.as_dict()).shape == (0, 4, 64)
    assert launch.block_attention(**args.to(kernel_device).as_dict()).shape == (0, 4, 64)


@pytest.mark.parametrize("splits", [1, 2])
def test_cache_past_int32_elements(
    splits: int, split: Callable[..., None], kernel_device: str
) -> None:
    """Block id * stride passes 2**31. Pages that nothing touches take no memory."""
    if kernel_device == "cuda":
        pytest.skip("a GPU backs every page: the interpreter's addresses stand for both")
    split(splits)
    args = make_arguments((2,), (40,), dtype=torch.float16)
    stride, far_blocks = 2**26, [33, 32, 35]
    # Not torch.empty, whose poison would touch every page.
    storage = torch.UntypedStorage((max(far_blocks) + 1) * stride * 2)
    memory = torch.tensor([], dtype=torch.float16).set_(storage)
    shape = (max(far_blocks) + 1, *args.kv_cache.shape[1:])
    cache = memory.as_strided(shape, (stride, *args.kv_cache.stride()[1:]))
    cache[far_blocks] = args.kv_cache[args.block_table[0, :3]]
    far = replace(args, kv_cache=cache, block_table=torch.tensor([far_blocks], dtype=torch.int32))
    found = launch.block_attention(**far.as_dict())
    assert_close(found, loop_over_rows(args), ERROR_RATIO[torch.float16])


@pytest.mark.parametrize("mask", ["zero", "tree"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits(splits: int, mask: str, split: Callable[..., None], kernel_device: str) -> None:
    """Very different lengths in one batch: some requests are split, others not."""
    split(splits)
    args = make_arguments((1, 8, 0, 3, 2), (0, 200, 40, 65, 1), mask=mask)
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
def test_splits_of_head_sizes_and_dtypes(
    head_size: int, dtype: torch.dtype, split: Callable[..., None], kernel_device: str
) -> None:
    split(3)
    args = make_arguments((2, 3), (17, 130), head_size=head_size, mask="tree", dtype=dtype)
    check_kernel(args, kernel_device)


def test_split_of_a_full_block_over_several_tiles(
    split: Callable[..., None], kernel_device: str
) -> None:
    split(3)
    check_kernel(make_arguments((64, 7), (70, 9), heads=(3, 1), mask="causal"), kernel_device)


@pytest.mark.parametrize("splits", [2, 6])
def test_more_requests_than_one_step_of_the_search(
    splits: int, split: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    split(splits)
    monkeypatch.setattr(launch, "BLOCK_R", 4)
    lens = (0, 1, 2, 150, 40, 3, 0, 90, 100)
    check_kernel(make_arguments([1] * 9, lens, heads=(1, 1), head_size=16), kernel_device)


def test_padding_request_of_negative_length(split: Callable[..., None], kernel_device: str) -> None:
    """A captured graph runs requests that nobody reads; their lengths may come to -1."""
    split(3)
    args = make_arguments((2, 2), (90, 0))
    expected = reference.block_attention(**args.to(torch.float64).as_dict())
    padded = replace(args, context_lens=torch.tensor([90, -1], dtype=torch.int32))
    found = launch.block_attention(**padded.to(kernel_device).as_dict())
    assert_close(found, expected, ERROR_RATIO[torch.float32])


@pytest.mark.parametrize("splits", [1, 5])
def test_long_context(splits: int, split: Callable[..., None], kernel_device: str) -> None:
    split(splits)
    args = make_arguments(
        (3, 2), (4096, 5), heads=(2, 1), head_size=32, mask="causal", dtype=torch.float16
    )
    check_kernel(args, kernel_device)


def test_longest_context(
    split: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    """2**17 tokens beside a short request; longer steps than usual, for the interpreter."""
    split(5)
    sizes = launch.tile_sizes
    monkeypatch.setattr(launch, "tile_sizes", lambda *a: sizes(*a) | {"BLOCK_N": 256})
    lens = (131_072, 300)
    args = make_arguments(
        (2, 1), lens, heads=(2, 1), head_size=16, block_size=128, dtype=torch.float16
    )
    check_kernel(args, kernel_device)


@pytest.mark.parametrize(
    ("lens", "splits", "least", "partials"),
    [
        ((1024,), 4, 256, 4),
        ((1024,), 9, 256, 4),
        ((1025,), 4, 256, 4),
        ((1024, 0, 3), 4, 256, 4),
        ((2048, 64, 64), 4, 256, 4),
        ((600, 600), 2, 256, 0),
        ((600, 600), 3, 256, 4),
        ((300, 10), 2, 256, 2),
        ((256, 256), 9, 256, 0),
        ((0, 0), 5, 256, 0),
    ],
)
def test_splits_follow_the_lengths(
    lens: tuple[int, ...],
    splits: int,
    least: int,
    partials: int,
    split: Callable[..., None],
    kernel_device: str,
) -> None:
    """However wide the table is. Partial results that nothing writes stay NaN and are not read."""
    split(splits, least)
    seen: list[Tensor] = []
    combine = launch._combine_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Tensor, **kwargs: int) -> None:
                seen.extend(args[1:4])
                combine[grid](*args, **kwargs)

            return launch

    args = make_arguments([1] * len(lens), lens, heads=(1, 1), head_size=16)
    wide = torch.zeros(len(lens), 8192, dtype=torch.int32)
    wide[:, : args.block_table.shape[1]] = args.block_table
    # Undone before `kernel_device` puts the compiled kernel back.
    with mock.patch.object(launch, "_combine_kernel", Watched()):
        check_kernel(replace(args, block_table=wide), kernel_device)
    out, highest, total = seen
    assert len(out) == 2 * splits
    written = [partial.isfinite().flatten(1).all(1) for partial in (out, highest, total)]
    touched = [(~partial.isnan()).flatten(1).any(1) for partial in (out, highest, total)]
    for index in range(2 * splits):
        assert {bool(part[index]) for part in written + touched} == {index < partials}


@pytest.mark.parametrize("splits", [1, 4])
def test_context_is_loaded_ahead(splits: int, split: Callable[..., None]) -> None:
    """The compiler overlaps the loop's loads with its products only in some ways of writing it."""
    split(splits)
    arguments = make_arguments((2,), (40,), block_size=16, dtype=torch.float16).as_dict()
    launched = aot.launches_of(lambda: launch.block_attention(**arguments))[0]
    assert "cp.async" in aot.compile_launch(launched, "sm_80").asm["ptx"]


def test_launch_reads_nothing_on_the_host(split: Callable[..., None]) -> None:
    """A fake tensor has no values: reading one would raise. So launches fit a CUDA graph."""
    split(4)
    arguments = make_arguments((2, 3), (40, 100)).as_dict()
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        launches = aot.launches_of(lambda: launch.block_attention(**fake))
        assert len(launches) == 2
        with pytest.raises(DataDependentOutputException):
            reference.block_attention(**fake)


ragged_requests = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 70)), min_size=1, max_size=4)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    requests=ragged_requests,
    heads=st.sampled_from(HEADS),
    mask=st.sampled_from(MASKS),
    layout=st.sampled_from(LAYOUTS),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_ragged_batches(
    requests: list[tuple[int, int]],
    heads: tuple[int, int],
    mask: str,
    layout: str,
    splits: int,
    seed: int,
    split: Callable[..., None],
    kernel_device: str,
) -> None:
    split(splits)
    block_lens, context_lens = zip(*requests, strict=True)
    args = make_arguments(
        block_lens, context_lens, heads=heads, head_size=16, mask=mask, layout=layout, seed=seed
    )
    assert_close(
        reference.block_attention(**args.to(torch.float64).as_dict()), loop_over_rows(args), 1e-13
    )
    check_kernel(args, kernel_device)


@pytest.mark.parametrize("implementation", [reference, launch], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda tensor: tensor[:, 0]),
        ("query", lambda tensor: tensor[:, :3]),
        ("key", lambda tensor: tensor[:-1]),
        ("value", lambda tensor: tensor[:, :1]),
        ("value", lambda tensor: tensor.half()),
        ("kv_cache", lambda tensor: tensor[..., :64]),
        ("kv_cache", lambda tensor: tensor.bfloat16()),
        ("kv_cache", lambda tensor: tensor.mT.contiguous().mT),
        ("block_table", lambda tensor: tensor[0]),
        ("context_lens", lambda tensor: tensor[:1]),
        ("block_start_loc", lambda tensor: tensor[:-1]),
        ("block_mask", lambda tensor: tensor.int()),
        ("max_block_len", lambda _: 65),
        ("max_block_len", lambda _: 0),
        ("pages_per_block", lambda _: 0),
    ],
)
def test_refuses_arguments(name: str, change, implementation) -> None:
    arguments = make_arguments((2, 2), (4, 4)).as_dict()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: num_heads must"):
        implementation.block_attention(**arguments)
