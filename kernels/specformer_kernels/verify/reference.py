"""Verification of drafts in plain PyTorch: the oracle of the kernels and the path on CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from specformer_kernels.noise import Stream, gumbel, uniform
from specformer_kernels.verify import rules

RULES = ("greedy", "rejection", "rejection_with_replacement", "block", "coupled")
# The root and as many nodes as a word of the ancestor mask has bits.
MAX_ROWS = 65


class Verification(NamedTuple):
    """What became of the drafts; `specformer_kernels.verify.verify` says what the fields hold."""

    tokens: Tensor  # int64 [R, max_rows]
    num_tokens: Tensor  # int32 [R]
    rows: Tensor  # int64 [R, max_rows]


class KeyedNoise:
    """`rules.Noise` from the counter-based generator: nothing but the key decides."""

    def __init__(self, seed: Tensor, root_position: int) -> None:
        self.seed = seed
        self.root_position = root_position

    def accept(self, probability: float, node: int) -> bool:
        return self._draws[node] <= probability

    def sample(self, weights: Tensor, position: int) -> int:
        return int((weights.log() + self._gumbel(weights, position, Stream.RESIDUAL)).argmax())

    def sample_target(self, scores: Tensor, position: int) -> int:
        return int((scores + self._gumbel(scores, position, Stream.TARGET)).argmax())

    @cached_property
    def _draws(self) -> list[float]:
        nodes = torch.arange(MAX_ROWS, device=self.seed.device)
        return uniform(self.seed, torch.tensor(self.root_position), nodes, Stream.ACCEPT).tolist()

    def _gumbel(self, like: Tensor, position: int, stream: Stream) -> Tensor:
        tokens = torch.arange(len(like), device=like.device)
        return gumbel(self.seed, torch.tensor(position), tokens, stream, like.dtype)


def verify(
    logits: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    *,
    rule: str,
    parents: Tensor | None = None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_rows: Tensor | None = None,
    max_children: int | None = None,
) -> Verification:
    """Verify the drafts of R requests straight from the target's logits.

    Shapes and dtypes as in `specformer_kernels.verify.verify`. Computes in float32, or in float64
    for float64 logits, one request after the other. Reads every argument on the host.
    """
    check_arguments(
        logits,
        tokens,
        row_start_loc,
        max_rows,
        rule,
        parents,
        temperature,
        seeds,
        positions,
        draft_logits,
        draft_rows,
        max_children,
    )
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    # The greedy rule has use for none of these.
    temperature = torch.zeros(len(row_start_loc) - 1) if temperature is None else temperature
    seeds = torch.zeros(len(temperature), dtype=torch.int64) if seeds is None else seeds
    positions = torch.zeros_like(tokens) if positions is None else positions

    result = _empty_result(row_start_loc, max_rows)
    for index, rows in _requests(row_start_loc, max_rows):
        request = rules.Request(
            logits=logits[rows].to(compute_dtype),
            tokens=tokens[rows].tolist(),
            children=_children(parents, rows),
            positions=positions[rows].tolist(),
            temperature=float(temperature[index]),
        )
        if draft_logits is not None and draft_rows is not None:
            request.draft_logits = _Proposals(draft_logits, draft_rows[rows], compute_dtype)
        noise = KeyedNoise(seeds[index], request.positions[0])
        path = rules.walk(request, rule, noise)
        _write(result, index, rows.start, request.tokens, path)
    return result


def follow(
    sampled: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    parents: Tensor | None = None,
) -> Verification:
    """Accept the drafts that equal what the target sampled in the row before them.

    Shapes and dtypes as in `specformer_kernels.verify.follow`. Reads every argument on the host.
    """
    check_follow_arguments(sampled, tokens, row_start_loc, max_rows, parents)
    result = _empty_result(row_start_loc, max_rows)
    for index, rows in _requests(row_start_loc, max_rows):
        drafts = tokens[rows].tolist()
        path = rules.follow(drafts, _children(parents, rows), sampled[rows].tolist().__getitem__)
        _write(result, index, rows.start, drafts, path)
    return result


class _Proposals:
    """Draft logits of a node's children, by the node's index within its request."""

    def __init__(self, draft_logits: Tensor, draft_rows: Tensor, dtype: torch.dtype) -> None:
        self.draft_logits = draft_logits
        self.dtype = dtype
        self.draft_rows = draft_rows.tolist()

    def __call__(self, node: int) -> Tensor | None:
        row = self.draft_rows[node]
        is_proposal = 0 <= row < len(self.draft_logits)
        return self.draft_logits[row].to(self.dtype) if is_proposal else None


def _requests(row_start_loc: Tensor, max_rows: int) -> Iterator[tuple[int, slice]]:
    """Index and rows of each request that has rows."""
    bounds = row_start_loc.tolist()
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            yield index, slice(start, min(end, start + max_rows))


def _children(parents: Tensor | None, rows: slice) -> list[list[int]]:
    """Nodes below each node of one request, in row order."""
    size = rows.stop - rows.start
    above = list(range(-1, size - 1)) if parents is None else parents[rows].tolist()
    children: list[list[int]] = [[] for _ in range(size)]
    for node in range(1, size):
        if 0 <= above[node] < node:
            children[above[node]].append(node)
    return children


def _empty_result(row_start_loc: Tensor, max_rows: int) -> Verification:
    shape = (len(row_start_loc) - 1, max_rows)
    device = row_start_loc.device
    return Verification(
        tokens=torch.full(shape, -1, dtype=torch.int64, device=device),
        num_tokens=torch.zeros(shape[0], dtype=torch.int32, device=device),
        rows=torch.full(shape, -1, dtype=torch.int64, device=device),
    )


def _write(
    result: Verification,
    index: int,
    start: int,
    drafts: Sequence[int],
    path: rules.Path | None,
) -> None:
    if path is None:
        return
    emitted = [drafts[node] for node in path.nodes[1:]] + [path.token]
    result.num_tokens[index] = len(emitted)
    result.tokens[index, : len(emitted)] = torch.tensor(emitted)
    result.rows[index, : len(emitted)] = torch.tensor(path.nodes) + start


def check_arguments(
    logits: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    rule: str,
    parents: Tensor | None,
    temperature: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    draft_logits: Tensor | None,
    draft_rows: Tensor | None,
    max_children: int | None,
) -> None:
    """Raise ValueError, naming the argument, where shapes, dtypes or choices break the contract."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, found {rule!r}")
    _check_logits("logits", logits)
    num_rows, vocab_size = logits.shape
    _check_rows(num_rows, tokens, row_start_loc, max_rows, parents)
    if rule == "block" and parents is not None:
        raise ValueError("parents: expected None for block verification, which knows chains only")

    num_requests = len(row_start_loc) - 1
    floats, integers = (torch.float32,), (torch.int64,)
    for name, tensor, length, dtypes in (
        ("temperature", temperature, num_requests, floats),
        ("seeds", seeds, num_requests, integers),
        ("positions", positions, num_rows, integers),
        ("draft_rows", draft_rows, num_rows, (torch.int32, torch.int64)),
    ):
        if tensor is not None:
            _check_vector(name, tensor, length, dtypes)
        elif rule != "greedy" and name != "draft_rows":
            raise ValueError(f'{name}: expected a tensor for rule "{rule}", found None')

    if (draft_logits is None) != (draft_rows is None):
        missing = "draft_logits" if draft_logits is None else "draft_rows"
        raise ValueError(f"{missing}: expected a tensor, since the other is given, found None")
    if draft_logits is not None:
        _check_logits("draft_logits", draft_logits)
        if draft_logits.shape[1] != vocab_size:
            raise ValueError(
                f"draft_logits: expected logits' vocabulary of {vocab_size}, "
                f"found {draft_logits.shape[1]}"
            )
    if max_children is not None and max_children < 1:
        raise ValueError(f"max_children: expected at least 1, found {max_children}")
    needs_bound = draft_logits is not None and rule.startswith("rejection")
    if parents is not None and needs_bound and max_children is None:
        raise ValueError(f'max_children: expected a bound for rule "{rule}" on trees, found None')


def check_follow_arguments(
    sampled: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    parents: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    if sampled.dim() != 1 or sampled.dtype != torch.int64:
        raise ValueError(
            f"sampled: expected [rows] of torch.int64, found {list(sampled.shape)} of "
            f"{sampled.dtype}"
        )
    _check_rows(len(sampled), tokens, row_start_loc, max_rows, parents)


def _check_rows(
    num_rows: int, tokens: Tensor, row_start_loc: Tensor, max_rows: int, parents: Tensor | None
) -> None:
    if row_start_loc.dim() != 1 or len(row_start_loc) == 0 or row_start_loc.dtype != torch.int32:
        raise ValueError(
            f"row_start_loc: expected [requests + 1] of torch.int32, found "
            f"{list(row_start_loc.shape)} of {row_start_loc.dtype}"
        )
    _check_vector("tokens", tokens, num_rows, (torch.int32, torch.int64))
    if parents is not None:
        _check_vector("parents", parents, num_rows, (torch.int32,))
    if not 1 <= max_rows <= MAX_ROWS:
        raise ValueError(f"max_rows: expected 1 to {MAX_ROWS}, found {max_rows}")


def _check_vector(name: str, tensor: Tensor, length: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], found {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {expected}, found {tensor.dtype}")


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"{name}: expected [rows, vocabulary] floating point, found {list(logits.shape)} of "
            f"{logits.dtype}"
        )
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: expected a vocabulary, found none")
    if logits.numel() and logits.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, found stride {logits.stride(-1)}"
        )
