"""Calls of verify: chains of 8 drafts, and trees, at the vocabulary of Qwen3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from specformer_kernels.verify import launch, reference

from kernel_cases import Alternative, BenchCase

VOCABULARY, NUM_DRAFTS, TIMED_DRAFTS = 151_936, 8, 4
WIDTHS: tuple[int, ...] = (4, 2, 1)  # children of a node, by its depth
# Rounding decides a test or a draw this close otherwise; one request in a hundred is far more.
TOLERANCE = 1e-2
# Aimed at where bytes, not launches or noise, take the time: so many rows to a launch.
AIM, AIM_VISITS = 0.85, 165
TEMPERATURE, ROOT_POSITION = 0.8, 1000

_KEYWORDS = (
    *("parents", "temperature", "seeds", "positions", "draft_logits", "draft_rows"),
    "max_children",
)


def aot_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call, once for every launch that has tile sizes or branches of its own."""
    chain = (1,) * NUM_DRAFTS
    for name, rule, widths, vocabulary, is_drawn in (
        ("greedy, chain of 9", "greedy", chain, VOCABULARY, True),
        ("coupled, chain of 9", "coupled", chain, VOCABULARY, True),
        ("rejection, chain of 9", "rejection", chain, VOCABULARY, True),
        ("block, chain of 9", "block", chain, VOCABULARY, True),
        ("rejection, tree of 65 of 262144", "rejection", (16, 3), 262_144, True),
        ("no proposals, tree of 21", "rejection", WIDTHS, VOCABULARY, False),
    ):
        arguments = _inputs(1, widths, vocabulary, dtype, "cpu", is_drawn, torch.zeros)
        yield name, partial(_verify, launch.verify, rule, *arguments)
    _, tokens, row_start_loc, max_rows, parents, *_ = arguments
    follow = partial(launch.follow, tokens, tokens, row_start_loc, max_rows, parents)
    yield f"follow, tree of {max_rows}", follow


def bench_cases(device: str, dtype: torch.dtype, quick: bool) -> Iterator[BenchCase]:
    """Chains of 4 drafts for 1 to 128 requests by every rule, trees of 21 rows for up to 64."""
    vocabulary, batches, tree = VOCABULARY, [1, 16, 64, 128], WIDTHS
    if device == "cpu":
        vocabulary, batches, tree = 300, [2], (2, 1)
    elif quick:
        batches = [64]
    chain = (1,) * TIMED_DRAFTS
    for requests in batches:
        for name, rule, widths, is_drawn, launches in (
            ("greedy", "greedy", chain, False, 2),
            ("coupled", "coupled", chain, False, 2),
            ("rejection", "rejection", chain, True, 4),
            ("no proposals", "rejection", chain, False, 4),
            ("block", "block", chain, True, 6),
            ("tree, coupled", "coupled", tree, False, 2),
            ("tree, without replacement", "rejection", tree, True, 8),
            ("tree, with replacement", "rejection_with_replacement", tree, True, 8),
        ):
            rows, inner = _num_rows(widths), _num_rows(widths[:-1])
            if widths == tree and requests > 64:
                continue
            visits = rows + inner * is_drawn + _second_visits(rule, widths, is_drawn)
            is_aimed = requests * visits >= AIM_VISITS * launches
            yield BenchCase(
                name=f"{name}, {requests} requests of {rows} rows",
                inputs=partial(_inputs, requests, widths, vocabulary, dtype, device, is_drawn),
                kernel=partial(_verify, launch.verify, rule),
                reference=partial(_verify, reference.verify, rule),
                least_bytes=requests * (visits * vocabulary * dtype.itemsize + rows * 40),
                launches=launches,
                tolerance=TOLERANCE,
                aim=AIM if is_aimed and rule != "coupled" else None,
                alternatives=_alternatives(rule, widths, is_drawn, device),
            )


def _alternatives(
    rule: str, widths: tuple[int, ...], is_drawn: bool, device: str
) -> dict[str, Alternative | str]:
    vllm: Alternative | str = "needs a GPU"
    if max(widths) > 1 or rule == "coupled":
        vllm = "not in vLLM"
    elif device == "cuda":
        # Its noise is other noise.
        vllm = Alternative(partial(_vllm, rule), partial(_vllm_inputs, rule), is_comparable=False)
    others: dict[str, Alternative | str] = {"vLLM": vllm}
    if rule == "greedy":
        others["argmax, cumprod"] = Alternative(_argmax, is_comparable=False)
    return others | {"torch.compile": "not compiled: the reference walks on the host"}


def _second_visits(rule: str, widths: tuple[int, ...], is_drawn: bool) -> int:
    """Rows of a request that are read again once their sums are known.

    No chip holds such a row meanwhile. The last token is drawn from one row of p and one of q. A
    later sibling needs the mass that the earlier leave, a block that of every row but the ends.
    """
    if rule in ("greedy", "coupled"):
        return 0
    if not is_drawn:
        return 1
    if rule == "block":
        return 2 * (len(widths) - 1) + 2
    rejections = sum(
        _num_rows(widths[:depth]) - _num_rows(widths[: depth - 1]) if depth else 1
        for depth in range(len(widths))
        for _ in range(widths[depth] - 1)
    )
    return 2 * rejections + 2


def _num_rows(widths: tuple[int, ...]) -> int:
    rows, level = 1, 1
    for width in widths:
        level *= width
        rows += level
    return rows


def _tree(widths: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Parent and depth of every node, level by level."""
    parents, depths, level = [0], [0], [0]
    for depth, width in enumerate(widths, 1):
        below = [node for node in level for _ in range(width)]
        level = list(range(len(parents), len(parents) + len(below)))
        parents += below
        depths += [depth] * len(below)
    return parents, depths


def _inputs(
    requests: int, widths: tuple[int, ...], vocabulary: int, dtype: torch.dtype, device: str,
    is_drawn: bool, new: Callable[..., torch.Tensor] = torch.randn,
) -> tuple[Any, ...]:  # fmt: skip
    """Drafts drawn from noisy logits of the target, one proposal for each inner row."""
    parents, depths = _tree(widths)
    rows, inner = len(parents), _num_rows(widths[:-1])
    logits = 2 * new(requests, rows, vocabulary, dtype=dtype, device=device)
    proposals = logits[:, :inner] + new(requests, inner, vocabulary, dtype=dtype, device=device)
    chances = (proposals.float() / TEMPERATURE).softmax(dim=-1).flatten(0, 1)
    most = max(widths)
    drafts = torch.multinomial(chances, most).view(requests, inner, most)
    tokens = torch.zeros(requests, rows, dtype=torch.int64, device=device)
    tried = [0] * rows
    for node in range(1, rows):
        tokens[:, node] = drafts[:, parents[node], tried[parents[node]]]
        tried[parents[node]] += 1
    draft_rows = torch.arange(requests, device=device)[:, None] * inner
    draft_rows = draft_rows + torch.arange(rows, device=device).clamp(max=inner - 1)
    positions = torch.tensor(depths, device=device).repeat(requests) + ROOT_POSITION
    chain = most == 1
    parent_ids = torch.tensor(parents, dtype=torch.int32, device=device).repeat(requests)
    return (
        logits.flatten(0, 1),
        tokens.flatten(),
        torch.arange(0, requests * rows + 1, rows, dtype=torch.int32, device=device),
        rows,
        None if chain else parent_ids,
        torch.full((requests,), TEMPERATURE, device=device),
        torch.randint(2**40, (requests,), device=device),
        positions,
        proposals.flatten(0, 1) if is_drawn else None,
        draft_rows.flatten() if is_drawn else None,
        most,
    )


def _verify(
    verify: Callable[..., reference.Verification], rule: str, *inputs: Any
) -> reference.Verification:
    """The first four by position: logits, tokens, row_start_loc, max_rows."""
    keywords = dict(zip(_KEYWORDS, inputs[4:], strict=True))
    return verify(*inputs[:4], rule=rule, **keywords)


def _argmax(
    logits: torch.Tensor, tokens: torch.Tensor, row_start_loc: torch.Tensor, rows: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = logits.argmax(dim=-1).view(-1, rows)
    is_kept = (chosen[:, :-1] == tokens.view(-1, rows)[:, 1:]).cumprod(dim=1)
    return chosen, is_kept.sum(dim=1)


def _vllm_inputs(rule: str, *inputs: Any) -> tuple[Any, ...]:
    """vLLM divides the target's logits by the temperature in a pass of its own, not timed here."""
    logits, tokens, row_start_loc, rows, _, temperature, seeds, positions, proposals, *_ = inputs
    requests = len(temperature)
    index = torch.arange(requests, dtype=torch.int32, device=logits.device)
    if proposals is not None:
        proposals = proposals.view(requests, rows - 1, -1)
    return (
        logits / TEMPERATURE,
        proposals,
        tokens,
        row_start_loc,
        positions,
        index,
        index.repeat_interleave(rows),
        torch.arange(rows, dtype=torch.int32, device=logits.device).repeat(requests),
        torch.zeros_like(temperature) if rule == "greedy" else temperature,
        seeds,
        rows - 1,
    )


def _vllm(rule: str, *inputs: Any) -> Any:
    """The sampler of vLLM's second model runner, 0.32."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    return rejection_sample(*inputs, use_block_verification=rule == "block")
