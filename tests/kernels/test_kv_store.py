"""Storing K and V, rotated or not: the kernel against the reference, and nothing else is written.

Without a rotation the kernel copies, so it must agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specformer_kernels.kv_store import kv_store, reference, rotate, triton_kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Largest RMS error over RMS of the float64 result, for inputs already rounded to the dtype.
# float32: two products and a sum, each rounded to 6e-8 at most; the table is float32 for both.
# float16: the result is rounded once, 2**-11 at most.
# bfloat16: the interpreter truncates the result where a GPU rounds, 2**-7 at most.
ERROR_RATIO = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 8e-3}
DTYPES = list(ERROR_RATIO)
LAYOUTS = ["heads_first", "tokens_first", "shared"]
NUM_BLOCKS, BLOCK_SIZE = 5, 16
MAX_POSITION = 50
SLOTS = [79, -1, 0, 33, -1, 16]


def make_cache(
    num_kv_heads: int, head_size: int, dtype: torch.dtype, layout: str = "heads_first"
) -> Tensor:
    shape = (NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, 2 * head_size)
    if layout == "heads_first":
        return torch.randn(shape).to(dtype)
    if layout == "tokens_first":
        return torch.randn(shape).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return torch.randn(NUM_BLOCKS, 3, *shape[1:]).to(dtype)[:, 1]


def make_table(head_size: int) -> Tensor:
    """Cosines and sines of random angles, in rows wider than they need be."""
    angles = torch.rand(MAX_POSITION, head_size // 2) * 6.3
    return torch.cat((angles.cos(), angles.sin(), angles), dim=-1)[:, :head_size]


def make_arguments(
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    slots: list[int] = SLOTS,
    num_queries: int = 3,
    layout: str = "heads_first",
) -> dict[str, Any]:
    """Rows as views of one projection: queries, keys and values side by side, strides their own.

    Skipped rows have positions no table holds.
    """
    num_heads, num_kv_heads = heads
    num_rows = len(slots)
    fused = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_size).to(dtype)
    queries = torch.randn(num_queries, num_heads + 1, head_size).to(dtype)
    slot_mapping = torch.tensor(slots, dtype=torch.int64)
    positions = torch.randint(0, MAX_POSITION, (num_rows,))
    return {
        "key": fused[:, num_heads : num_heads + num_kv_heads],
        "value": fused[:, num_heads + num_kv_heads :],
        "kv_cache": make_cache(num_kv_heads, head_size, dtype, layout),
        "slot_mapping": slot_mapping,
        "rotary_table": make_table(head_size),
        "positions": torch.where(slot_mapping < 0, 1 << 40, positions),
        "query": queries[:, :num_heads],
        "query_positions": torch.randint(0, MAX_POSITION, (num_queries,)),
    }


def without_rotation(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in ("key", "value", "kv_cache", "slot_mapping")}


def run_kernel(arguments: dict[str, Any], device: str) -> tuple[Tensor | None, Tensor]:
    """What the kernel returns, and the cache it leaves; nothing else may change."""
    moved = {name: tensor.to(device) for name, tensor in arguments.items()}
    cache = arguments["kv_cache"]
    layout = (cache.shape, cache.stride(), cache.storage_offset())
    memory = torch.tensor([], dtype=cache.dtype).set_(cache.untyped_storage())
    moved_memory = memory.clone().to(device)
    moved["kv_cache"] = moved_memory.as_strided(*layout)
    inputs = {name: tensor.clone() for name, tensor in moved.items() if name != "kv_cache"}
    out = triton_kernel.kv_store(**moved)
    for name, before in inputs.items():
        assert torch.equal(moved[name], before)
    others = torch.ones(memory.shape, dtype=torch.bool)  # pages of other layers
    others.as_strided(*layout).fill_(False)
    assert torch.equal(moved_memory.cpu()[others], memory[others])
    return None if out is None else out.cpu(), moved["kv_cache"].cpu()


def exact(arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """The reference in float64: what it returns, and the cache it leaves."""
    wide = {
        name: tensor.double() if tensor.is_floating_point() and name != "rotary_table" else tensor
        for name, tensor in arguments.items()
    }
    wide["kv_cache"] = wide["kv_cache"].clone()
    return reference.kv_store(**wide), wide["kv_cache"]


def assert_close(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None
    assert expected is not None
    assert found.dtype == dtype
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    assert error <= ERROR_RATIO[dtype] * expected.norm()  # NaN fails too


def assert_cache(found: Tensor, expected: Tensor, arguments: dict[str, Any]) -> None:
    """The stored keys are close; the values and everything that was there before are equal."""
    before, dtype = arguments["kv_cache"], arguments["key"].dtype
    head_size = arguments["key"].shape[-1]
    stored = arguments["slot_mapping"][arguments["slot_mapping"] >= 0]
    place = (stored // BLOCK_SIZE, slice(None), stored % BLOCK_SIZE)
    assert torch.equal(found[..., head_size:].double(), expected[..., head_size:])
    assert_close(found[place][..., :head_size], expected[place][..., :head_size], dtype)
    untouched = torch.ones(before.shape[0], BLOCK_SIZE, dtype=torch.bool)
    untouched[place[0], place[2]] = False
    assert torch.equal(found.transpose(1, 2)[untouched], before.transpose(1, 2)[untouched])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(42)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(2, 64), (1, 80), (3, 33), (40, 128)])
def test_copies(
    num_kv_heads: int, head_size: int, layout: str, dtype: torch.dtype, kernel_device: str
) -> None:
    key, value = (
        torch.randn(len(SLOTS), 3 * num_kv_heads, head_size)
        .to(dtype)
        .split([2 * num_kv_heads, num_kv_heads], dim=1)
    )
    cache = make_cache(num_kv_heads, head_size, dtype, layout)
    expected, slots = cache.clone(), torch.tensor(SLOTS)
    reference.kv_store(key[:, :num_kv_heads], value, expected, slots)
    cache = cache.to(kernel_device)
    moved = [tensor.to(kernel_device) for tensor in (key, value, slots)]
    assert triton_kernel.kv_store(moved[0][:, :num_kv_heads], moved[1], cache, moved[2]) is None
    assert torch.equal(cache.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("heads", "head_size"), [((4, 2), 64), ((5, 1), 80), ((9, 3), 96), ((1, 1), 2), ((70, 35), 128)]
)
def test_rotates(
    heads: tuple[int, int], head_size: int, layout: str, dtype: torch.dtype, kernel_device: str
) -> None:
    arguments = make_arguments(heads, head_size, dtype, layout=layout)
    expected_query, expected_cache = exact(arguments)
    query, cache = run_kernel(arguments, kernel_device)
    assert_close(query, expected_query, dtype)
    assert query is not None
    assert query.is_contiguous()
    assert_cache(cache, expected_cache, arguments)


def test_rotates_keys_alone(kernel_device: str) -> None:
    arguments = make_arguments()
    del arguments["query"], arguments["query_positions"]
    _, expected = exact(arguments)
    query, cache = run_kernel(arguments, kernel_device)
    assert query is None
    assert_cache(cache, expected, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_apart(layout: str, dtype: torch.dtype, kernel_device: str) -> None:
    """V in memory of its own, as two layers of a narrower cache hold K and V."""
    arguments = make_arguments(dtype=dtype, layout=layout)
    _, expected = exact(arguments)
    pages = [make_cache(2, 32, dtype, layout) for _ in range(2)]
    for page, side in zip(pages, arguments["kv_cache"].chunk(2, dim=-1), strict=True):
        page.copy_(side)
    moved = {name: tensor.to(kernel_device) for name, tensor in arguments.items()}
    key_cache, value_cache = (page.to(kernel_device) for page in pages)
    changes = {"kv_cache": key_cache, "value_cache": value_cache}
    triton_kernel.kv_store(**(moved | changes))
    found = torch.cat((key_cache, value_cache), dim=-1).cpu()
    assert_cache(found, expected, arguments)
    kv_store(**(arguments | dict(zip(changes, pages, strict=True))))
    assert_cache(torch.cat(pages, dim=-1), expected, arguments)


@pytest.mark.parametrize(
    ("slots", "num_queries"),
    [([], 0), ([], 2), ([-1, -1], 0), ([-1, -1], 1), ([7], 0), ([7], 1), (list(range(17)), 16)],
)
def test_few_rows(slots: list[int], num_queries: int, kernel_device: str) -> None:
    arguments = make_arguments(slots=slots, num_queries=num_queries)
    expected_query, expected_cache = exact(arguments)
    query, cache = run_kernel(arguments, kernel_device)
    assert_close(query, expected_query, torch.float32)
    assert_cache(cache, expected_cache, arguments)


@pytest.mark.parametrize("rotation", [False, True])
def test_reference_matches_the_definition(rotation: bool) -> None:
    """Row by row; a rotation as a product of complex numbers."""
    arguments = make_arguments(dtype=torch.float64, head_size=8)
    table = arguments["rotary_table"].double()

    def turn(x: Tensor, position: Tensor) -> Tensor:
        cos, sin = table[position].chunk(2)
        rotated = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
        return torch.cat((rotated.real, rotated.imag), dim=-1)

    expected = arguments["kv_cache"].clone()
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            key, value = arguments["key"][row], arguments["value"][row]
            key = turn(key, arguments["positions"][row]) if rotation else key
            expected[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = torch.cat((key, value), -1)
    query = kv_store(**(arguments if rotation else without_rotation(arguments)))
    torch.testing.assert_close(arguments["kv_cache"], expected)
    if rotation:
        pairs = zip(arguments["query"], arguments["query_positions"], strict=True)
        torch.testing.assert_close(query, torch.stack([turn(x, p) for x, p in pairs]))
    else:
        assert query is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotation_rounds_once(dtype: torch.dtype) -> None:
    x, table = torch.randn(6, 3, 64).to(dtype), make_table(64)
    positions = torch.randint(0, MAX_POSITION, (6,))
    assert torch.equal(rotate(x, table, positions), rotate(x.float(), table, positions).to(dtype))


class Operators(TorchDispatchMode):
    """Counts what PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_reference_takes_as_many_operators_for_any_batch() -> None:
    """No loop over rows, and no selection of rows where all of them are stored."""
    found = []
    for count in (2, 64):
        arguments = make_arguments(slots=list(range(count)), num_queries=count)
        with Operators() as operators:
            kv_store(**arguments)
        found.append(operators.names)
    assert found[0] == found[1]
    assert "nonzero" not in found[0]


def test_slots_past_int32_elements(kernel_device: str) -> None:
    """Block id * stride passes 2**31. Pages that nothing touches take no memory."""
    if kernel_device == "cuda":
        pytest.skip("a GPU backs every page: the interpreter's addresses stand for both")
    far_block, stride = 33, 2**26
    arguments = make_arguments(dtype=torch.float16, slots=[far_block * BLOCK_SIZE + 3])
    storage = torch.UntypedStorage((far_block + 1) * stride * 2)
    memory = torch.tensor([], dtype=torch.float16).set_(storage)
    near = arguments["kv_cache"]
    cache = memory.as_strided((far_block + 1, *near.shape[1:]), (stride, *near.stride()[1:]))
    triton_kernel.kv_store(**(arguments | {"kv_cache": cache}))
    _, expected = exact(arguments | {"slot_mapping": torch.tensor([3])})
    assert_close(cache[far_block, :, 3], expected[0, :, 3], torch.float16)
    assert not cache[far_block, :, 2].any()


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    slots=st.lists(
        st.integers(-20, NUM_BLOCKS * BLOCK_SIZE - 1), max_size=9, unique_by=lambda s: s
    ),
    num_queries=st.integers(0, 3),
    heads=st.sampled_from([(3, 1), (4, 2), (7, 7)]),
    head_size=st.sampled_from([16, 18, 80]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_random_batches(
    slots: list[int],
    num_queries: int,
    heads: tuple[int, int],
    head_size: int,
    layout: str,
    seed: int,
    kernel_device: str,
) -> None:
    torch.manual_seed(seed)
    arguments = make_arguments(heads, head_size, torch.float32, slots, num_queries, layout)
    expected_query, expected_cache = exact(arguments)
    query, cache = run_kernel(arguments, kernel_device)
    assert_close(query, expected_query, torch.float32)
    assert_cache(cache, expected_cache, arguments)


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
@pytest.mark.parametrize(
    "change",
    [lambda pages: pages[1:], lambda pages: pages.half(), lambda pages: pages.transpose(1, 2)],
)
def test_refuses_values_apart(change: Any, implementation: Any) -> None:
    arguments = make_arguments()
    pages = arguments["kv_cache"][..., :64].clone()
    changes = {"kv_cache": pages, "value_cache": change(pages)}
    with pytest.raises(ValueError, match=r"^value_cache: expected"):
        implementation.kv_store(**(arguments | changes))


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda tensor: tensor[0]),
        ("value", lambda tensor: tensor[:1]),
        ("value", lambda tensor: tensor.half()),
        ("kv_cache", lambda tensor: tensor[:, :1]),
        ("kv_cache", lambda tensor: tensor[..., :64]),
        ("kv_cache", lambda tensor: tensor.mT.contiguous().mT),
        ("slot_mapping", lambda tensor: tensor[:1]),
        ("slot_mapping", lambda tensor: tensor.int()),
        ("rotary_table", lambda tensor: tensor[:, :32]),
        ("rotary_table", lambda tensor: tensor.half()),
        ("rotary_table", lambda tensor: tensor.mT.contiguous().mT),
        ("positions", lambda tensor: None),
        ("positions", lambda tensor: tensor[:1]),
        ("positions", lambda tensor: tensor.int()),
        ("query", lambda tensor: tensor[0]),
        ("query", lambda tensor: tensor[..., :32]),
        ("query", lambda tensor: tensor.half()),
        ("query", lambda tensor: tensor.mT.contiguous().mT),
        ("query_positions", lambda tensor: None),
        ("query_positions", lambda tensor: tensor[:1]),
        ("query_positions", lambda tensor: tensor.int()),
    ],
)
def test_refuses_arguments(name: str, change: Any, implementation: Any) -> None:
    arguments = make_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.kv_store(**arguments)


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("rotary_table", ["rotary_table", "positions"]),
        ("positions", ["rotary_table", "query", "query_positions"]),
        ("query_positions", ["query"]),
    ],
)
def test_refuses_half_a_rotation(name: str, missing: list[str], implementation: Any) -> None:
    arguments = {n: tensor for n, tensor in make_arguments().items() if n not in missing}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        implementation.kv_store(**arguments)


@pytest.mark.parametrize("implementation", [reference, triton_kernel], ids=["torch", "triton"])
def test_refuses_to_rotate_an_odd_head_size(implementation: Any) -> None:
    arguments = make_arguments(head_size=64)
    odd = {"key": 33, "value": 33, "kv_cache": 66, "query": 33, "rotary_table": 33}
    for name, size in odd.items():
        arguments[name] = arguments[name][..., :size]
    with pytest.raises(ValueError, match=r"^rotary_table: expected"):
        implementation.kv_store(**arguments)
