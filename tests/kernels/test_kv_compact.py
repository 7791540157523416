"""Moving K and V: bit for bit what a copy of all sources gives, for any overlap."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import aot
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.kv_compact import cache_addresses, reference, triton_kernel
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
LAYOUTS = ["heads_first", "tokens_first", "shared"]
NUM_BLOCKS, BLOCK_SIZE = 5, 16
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE
IMPLEMENTATIONS = [reference.kv_compact, triton_kernel.kv_compact]
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["torch", "triton"])


def make_cache(
    num_kv_heads: int = 2,
    head_size: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "heads_first",
) -> Tensor:
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, 2 * head_size)
    generator = torch.Generator().manual_seed(42)

    def rand(*size: int) -> Tensor:
        return torch.randint(0, 256, size, generator=generator).to(dtype)

    if layout == "heads_first":
        return rand(*shape)
    if layout == "tokens_first":
        return rand(*shape).transpose(1, 2).contiguous().transpose(1, 2)
    return rand(NUM_BLOCKS, 3, *shape[1:])[:, 1]


def moved(
    cache: Tensor, source: Sequence[Sequence[int]], target: Sequence[Sequence[int]]
) -> Tensor:
    """The definition: every target takes what its source held before the call."""
    out = cache.clone()
    for request_sources, request_targets in zip(source, target, strict=True):
        for one, other in zip(request_sources, request_targets, strict=True):
            if one >= 0 and other >= 0:
                row = cache[one // BLOCK_SIZE, :, one % BLOCK_SIZE]
                out[other // BLOCK_SIZE, :, other % BLOCK_SIZE] = row
    return out


def assert_moves(
    implementation: Callable,
    device: str,
    cache: Tensor,
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
) -> None:
    expected = moved(cache, source, target)
    found = cache.to(device)  # itself on the CPU, strides and all
    slots = (torch.tensor(one, dtype=torch.int64, device=device) for one in (source, target))
    implementation([found], *slots)
    assert torch.equal(found.cpu(), expected)


MOVES = {
    "path": ([[70, 3, 65, 71]], [[70, 71, 72, 73]]),  # 3 first lives where nothing is written
    "shift_down": ([[1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4]]),
    "shift_up": ([[0, 1, 2, 3, 4]], [[1, 2, 3, 4, 5]]),
    "swap": ([[7, 79]], [[79, 7]]),
    "rotation_over_pages": ([[0, 16, 32, 48, 64]], [[16, 32, 48, 64, 0]]),
    "in_place": ([[5, 6]], [[5, 6]]),
    "skips": ([[-1, 9, 10, -7]], [[8, -1, 9, -1]]),
    "one_source_twice": ([[40, 40, 41]], [[41, 42, 40]]),
    "requests": ([[1, 2, 3], [70, -1, 68]], [[0, 1, 2], [68, 69, 70]]),
}


@EACH
@pytest.mark.parametrize("moves", MOVES)
def test_moves(moves: str, implementation: Callable, kernel_device: str) -> None:
    assert_moves(implementation, kernel_device, make_cache(), *MOVES[moves])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(2, 64), (1, 80), (3, 96), (5, 256)])
def test_kernel_moves_any_cache(
    num_kv_heads: int, head_size: int, layout: str, dtype: torch.dtype, kernel_device: str
) -> None:
    cache = make_cache(num_kv_heads, head_size, dtype, layout)
    source, target = [[17, 3, 79, -1, 18]], [[18, 17, 3, 4, 40]]
    assert_moves(triton_kernel.kv_compact, kernel_device, cache, source, target)


@EACH
@pytest.mark.parametrize("num_moves", [1, 63, 64])
def test_permutations(num_moves: int, implementation: Callable, kernel_device: str) -> None:
    generator = torch.Generator().manual_seed(num_moves)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:num_moves]
    order = slots[torch.randperm(num_moves, generator=generator)]
    cache = make_cache(2, 80)
    assert_moves(implementation, kernel_device, cache, [order.tolist()], [slots.tolist()])


@EACH
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_move(
    shape: tuple[int, int], implementation: Callable, kernel_device: str
) -> None:
    cache = make_cache().to(kernel_device)
    before, slots = cache.clone(), torch.zeros(shape, dtype=torch.int64, device=kernel_device)
    implementation([cache], slots, slots)
    assert torch.equal(cache, before)


def test_cache_past_int32_elements(kernel_device: str) -> None:
    """Block id * stride passes 2**31. Pages that nothing touches take no memory."""
    if kernel_device == "cuda":
        pytest.skip("a GPU backs every page: the interpreter's addresses stand for both")
    stride, near = 2**26, make_cache(dtype=torch.float16)
    # Not torch.empty, whose poison would touch every page.
    storage = torch.UntypedStorage(40 * stride * 2)
    memory = torch.tensor([], dtype=torch.float16).set_(storage)
    cache = memory.as_strided((40, *near.shape[1:]), (stride, *near.stride()[1:]))
    cache[35:] = near
    slots = torch.tensor([[0, 17, 40, 79]]) + 35 * BLOCK_SIZE
    triton_kernel.kv_compact([cache], slots, slots.flip(1).contiguous())
    assert torch.equal(cache[35:], moved(near, [[0, 17, 40, 79]], [[79, 40, 17, 0]]))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_moves(data: st.DataObject, kernel_device: str) -> None:
    """Requests own separate slots; inside a request sources and targets overlap at will."""
    num_requests, num_moves = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    owned = torch.randperm(
        NUM_SLOTS, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ).tolist()
    share = NUM_SLOTS // num_requests
    source, target = [], []
    for request in range(num_requests):
        mine = owned[request * share : (request + 1) * share]
        count = {"min_size": num_moves, "max_size": num_moves}
        source.append(data.draw(st.lists(st.sampled_from([*mine[:8], -1]), **count)))
        chosen = data.draw(st.lists(st.sampled_from(mine), unique=True, **count))
        skipped = data.draw(st.lists(st.booleans(), **count))
        target.append([-1 if skip else slot for slot, skip in zip(chosen, skipped, strict=True)])
    for implementation in IMPLEMENTATIONS:
        assert_moves(implementation, kernel_device, make_cache(), source, target)


@EACH
@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_move_alike(
    layout: str, given: bool, implementation: Callable, kernel_device: str
) -> None:
    """Layers that lie anywhere, in one call."""
    source, target = [[17, 3, 79, -1, 18]], [[18, 17, 3, 4, 40]]
    layers = [make_cache(2, 8, torch.float32, layout).mul_(factor) for factor in (1, 2, 3)]
    expected = [moved(cache, source, target) for cache in layers]
    caches = [cache.to(kernel_device) for cache in layers]
    slots = (torch.tensor(one, device=kernel_device) for one in (source, target))
    implementation(caches, *slots, cache_addresses(caches) if given else None)
    for found, wanted in zip(caches, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


def test_compiled_kernel_loads_before_it_stores() -> None:
    """A warp must not write before every warp has read: the interpreter cannot tell."""
    slots = torch.zeros(1, 64, dtype=torch.int64)
    cache = make_cache(1, 256)
    (launch,) = aot.launches_of(lambda: triton_kernel.kv_compact([cache], slots, slots))
    text = aot.compile_launch(launch, "sm_90").asm["ptx"]
    found = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", text)
    order = [name for index, name in enumerate(found) if found[index - 1 : index] != [name]]
    assert order == ["ld.global", "bar.sync", "st.global"]


@EACH
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kv_caches", lambda caches: []),
        ("kv_caches", lambda caches: [caches[0][0]]),
        ("kv_caches", lambda caches: [caches[0].mT.contiguous().mT]),
        ("kv_caches", lambda caches: [caches[0], caches[0][:2]]),
        ("kv_caches", lambda caches: [caches[0], caches[0].half()]),
        ("addresses", lambda addresses: addresses.int()),
        ("addresses", lambda addresses: addresses.repeat(2)),
        ("source_slots", lambda tensor: tensor[0]),
        ("source_slots", lambda tensor: tensor.int()),
        ("source_slots", lambda tensor: tensor.new_zeros(2, 65)),
        ("target_slots", lambda tensor: tensor[:, :1]),
        ("target_slots", lambda tensor: tensor.int()),
        ("target_slots", lambda tensor: tensor.mT.contiguous().mT),
    ],
)
def test_refuses_arguments(name: str, change: Callable, implementation: Callable) -> None:
    slots = torch.arange(6).view(2, 3)
    arguments = {
        "kv_caches": [make_cache()],
        "source_slots": slots,
        "target_slots": slots,
        "addresses": torch.zeros(1, dtype=torch.int64),
    }
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation(**arguments)
