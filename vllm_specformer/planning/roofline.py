"""What a step costs on paper: bytes moved and operations done, on a device that reaches its peaks.

Every part of a step takes the longer of moving its bytes and doing its arithmetic, and the parts
follow each other. What a real step has on top of that (launches, host work, sampling, ramps) is not
here, so these are lower bounds, and their ratios are what is worth reading.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_specformer.planning.chips import Chip
from vllm_specformer.shapes import HeadShape, TargetShape


@dataclass(frozen=True)
class Work:
    """Bytes moved to and from memory, and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, count: float) -> Work:
        return Work(self.bytes * count, self.flops * count)

    def seconds(self, chip: Chip) -> float:
        """The longer of the two, each at its peak."""
        return max(self.bytes / chip.bytes_per_second, self.flops / chip.flops_per_second)


@dataclass(frozen=True)
class Step:
    """Named parts that run one after another."""

    parts: dict[str, Work]

    @property
    def total(self) -> Work:
        return sum(self.parts.values(), Work(0, 0))

    def seconds(self, chip: Chip) -> float:
        return sum(work.seconds(chip) for work in self.parts.values())


def matmul(rows: float, inner: int, outer: int, weight_bytes: float, state_bytes: float) -> Work:
    """[rows, inner] times a weight [inner, outer]: reads both, writes the result."""
    moved = inner * outer * weight_bytes + rows * (inner + outer) * state_bytes
    return Work(moved, 2 * rows * inner * outer)


def attention(
    requests: float, queries: float, context: float, shape: TargetShape | HeadShape, kv_bytes: float
) -> Work:
    """`queries` rows of each request attend to `context` cached tokens, which are read once."""
    cache = 2 * requests * context * shape.kv_heads * shape.head_dim
    pairs = requests * queries * context
    return Work(cache * kv_bytes, 4 * pairs * shape.heads * shape.head_dim)


def target_step(
    shape: TargetShape,
    batch: int,
    rows: int,
    context: int,
    *,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> Step:
    """One forward of the target that verifies `rows` tokens of each of `batch` requests.

    Args:
        rows: 1 without speculation, K + 1 with K drafted tokens.
        context: tokens each request has in its cache.
        weight_bytes, kv_bytes: of one weight and one cached number; 1 for fp8.
    """
    tokens, size = batch * rows, shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def linear(inner: int, outer: int, count: float = tokens) -> Work:
        return matmul(count, inner, outer, weight_bytes, 2)

    projections = linear(size, queries + 2 * keys) + linear(queries, size)
    parts = {
        "attention projections": projections.times(shape.layers),
        "attention": attention(batch, rows, context, shape, kv_bytes).times(shape.layers),
    }
    if shape.experts:
        # A token's experts are taken as drawn evenly: the share that no token of the step asks for.
        idle = (1 - shape.experts_per_token / shape.experts) ** tokens
        used = shape.experts * (1 - idle)
        each = tokens * shape.experts_per_token / used
        expert = linear(size, 2 * shape.intermediate, each) + linear(shape.intermediate, size, each)
        feed_forward = expert.times(used) + linear(size, shape.experts)
    else:
        feed_forward = linear(size, 2 * shape.intermediate) + linear(shape.intermediate, size)
    parts["feed-forward"] = feed_forward.times(shape.layers)
    parts["logits"] = linear(size, shape.vocab)
    return Step(parts)


def draft_step(
    head: HeadShape,
    batch: int,
    slots: int,
    context: int,
    *,
    context_rows: int | None = None,
    beam: int = 1,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> Step:
    """One draft pass over `slots` for each of `batch` requests; 0 stores K/V and no more.

    Args:
        context_rows: new context tokens of each request; `slots` + 1 unless said, the rows that
            the target has just verified.
        beam: nodes of a slot that may have children in a tree, each with logits; 1 for chains.
    """
    new = batch * (slots + 1 if context_rows is None else context_rows)
    size, drafted = head.hidden, batch * slots
    queries, keys = head.heads * head.head_dim, head.kv_heads * head.head_dim

    def linear(rows: int, inner: int, outer: int) -> Work:
        return matmul(rows, inner, outer, weight_bytes, 2)

    store = linear(new, head.hooks * size, size) + linear(new, size, 2 * keys)
    parts = {"context": store + Work(2 * new * keys * kv_bytes, 0)}
    if not slots:
        return Step(parts)
    if head.visible:
        context = min(context, head.visible)
    anchor = linear(batch, size, queries) + linear(batch, queries, size)
    parts["anchor"] = anchor + attention(batch, 1, context, head, kv_bytes)
    opened = slots if head.nested else head.slots
    rows = batch * opened
    open_slots = linear(batch, size, opened * size)
    if head.bonus:
        open_slots += linear(batch, size, size)
    layer = linear(rows, size, queries + 2 * keys) + linear(rows, queries, size)
    layer += linear(rows, size, 2 * head.intermediate) + linear(rows, head.intermediate, size)
    parts["slots"] = open_slots + layer.times(head.slot_layers)
    if head.mixed:
        seen = attention(batch, opened, context, head, kv_bytes)
        parts["slot attention"] = seen.times(head.slot_layers)
    parts["logits"] = linear(drafted, size, head.scored)
    if head.markov_rank:
        # The first slot of a gated head has no such term.
        each = linear(batch * beam, head.markov_rank, head.scored)
        parts["markov"] = each.times(slots - head.markov_gate)
        if head.markov_gate:
            parts["markov"] += linear(drafted - batch, size, head.markov_rank)
    return Step(parts)
