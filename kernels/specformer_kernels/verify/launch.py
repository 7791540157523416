"""Verification of drafts in Triton: the launches. Imports triton: load only to launch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from specformer_kernels.verify.reference import (
    Verification,
    check_arguments,
    check_follow_arguments,
)
from specformer_kernels.verify.triton_decide import _decide_kernel
from specformer_kernels.verify.triton_last import _draw_kernel, _last_kernel
from specformer_kernels.verify.triton_mass import _mass_kernel
from specformer_kernels.verify.triton_nodes import _nodes_kernel
from specformer_kernels.verify.triton_rows import _rows_kernel
from specformer_kernels.verify.triton_walk import _follow_kernel

# Tokens of the vocabulary per program. Not chosen by batch: the order of summation, and with it a
# request's result, does not depend on the requests beside it.
CHUNK = 4096


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
    """Launch a pass over all rows, a program per request, and a pass over a row of each request.

    Shapes and dtypes as in `specformer_kernels.verify.verify`; float64 is refused. No host sync,
    and what is launched follows from shapes, `rule`, `max_rows` and `max_children` alone: it can
    be captured in a CUDA graph.
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
    is_random = rule not in ("greedy", "coupled")
    if not is_random:
        draft_logits = draft_rows = None
    result = _empty_result(row_start_loc, max_rows)
    arguments = (
        _walk_arguments(result, tokens, row_start_loc, max_rows, parents)
        | _logits_arguments(logits, draft_logits)
        | {
            "draft_rows_ptr": _contiguous(draft_rows),
            "temperature_ptr": None if rule == "greedy" else _contiguous(temperature),
            "seeds_ptr": _contiguous(seeds),
            "positions_ptr": _contiguous(positions),
            "IS_COUPLED": rule == "coupled",
            # Without proposals the rules that accept at random are one.
            "IS_BLOCK": rule == "block" and draft_logits is not None,
            "IS_DISTINCT": rule == "rejection" or draft_logits is None,
            "MAX_CHILDREN": _most_children(max_rows, parents, draft_logits, max_children),
        }
    )
    if len(result.num_tokens):
        with torch.cuda.device_of(logits):
            _run(arguments, result, logits, is_random)
    return result


def follow(
    sampled: Tensor,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    parents: Tensor | None = None,
) -> Verification:
    """Launch one program per request; no host sync.

    Shapes and dtypes as in `specformer_kernels.verify.follow`.
    """
    check_follow_arguments(sampled, tokens, row_start_loc, max_rows, parents)
    result = _empty_result(row_start_loc, max_rows)
    arguments = _walk_arguments(result, tokens, row_start_loc, max_rows, parents) | {
        "sampled_ptr": _contiguous(sampled),
        "partials_ptr": None,
        "winners_ptr": None,
        "num_chunks": 1,
        "vocab_size": torch.iinfo(torch.int64).max,
        "BLOCK_C": 1,
    }
    if len(result.num_tokens):
        with torch.cuda.device_of(sampled):
            _launch(_follow_kernel, (len(result.num_tokens),), arguments)
    return result


def _run(arguments: dict[str, Any], result: Verification, logits: Tensor, is_random: bool) -> None:
    """Allocate what passes from one launch to the next, and launch."""
    num_rows, num_requests = len(logits), len(result.num_tokens)
    max_rows, num_chunks, block_c = (
        arguments[name] for name in ("max_rows", "num_chunks", "BLOCK_C")
    )
    floats = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    integers = functools.partial(torch.empty, dtype=torch.int32, device=logits.device)
    # Max and sum of p, and of q where there is one; a choice alone needs its max.
    num_fields = (4 if arguments["draft_logits_ptr"] is not None else 2) if is_random else 1
    arguments |= {
        "num_fields": num_fields,
        "partials_ptr": floats((num_rows, num_fields, block_c)),
        "winners_ptr": integers((num_rows, block_c)),
        "sampled_ptr": None,
    }
    by_row, by_request = (max_rows, num_chunks, num_requests), (num_requests,)
    _launch(_rows_kernel, by_row, arguments)
    if not is_random:
        _launch(_follow_kernel, by_request, arguments)
        return

    num_rounds = 1 if arguments["IS_BLOCK"] else arguments["MAX_CHILDREN"] - 1
    needs_mass = num_rounds > 0 and arguments["draft_logits_ptr"] is not None
    arguments |= {
        "mass_ptr": floats((num_rows, 2, block_c)) if needs_mass else None,
        "taken_ptr": floats((num_rows,)) if needs_mass else None,
        "draw_rows_ptr": torch.empty((num_requests,), dtype=torch.int64, device=logits.device),
        "draw_weights_ptr": floats((num_requests, 3)),
        "draw_best_ptr": floats((num_requests, block_c)),
        "draw_winners_ptr": integers((num_requests, block_c)),
    }
    if needs_mass:
        arguments["sums_ptr"] = floats((num_rows, 4))
        arguments["round_ptr"] = integers((num_rows,))
        arguments["previous_ptr"] = integers((num_rows,))
        _launch(_nodes_kernel, by_request, arguments)
        for index in range(1, num_rounds + 1):
            _launch(_mass_kernel, by_row, arguments | {"current_round": index})
    _launch(_decide_kernel, by_request, arguments)
    _launch(_draw_kernel, (num_chunks, num_requests), arguments)
    _launch(_last_kernel, by_request, arguments)


def _num_warps(kernel: Any, arguments: dict[str, Any]) -> int:
    names = _parameters(kernel.fn)
    if "BLOCK_V" in names:  # with noise, whose registers are many, 16 elements to a thread, else 32
        has_noise = "draw_best_ptr" in names or arguments["IS_COUPLED"]
        return min(8 if has_noise else 4, max(1, arguments["BLOCK_V"] // 512))
    # Rows by chunks, or by strips of other rows.
    return min(16, max(1, arguments["BLOCK_R"] * max(16, arguments["BLOCK_C"]) // 512))


def _launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch with those of the arguments that the kernel names."""
    named = {name: arguments[name] for name in _parameters(kernel.fn)}
    kernel[grid](**named, num_warps=_num_warps(kernel, arguments))


@functools.cache
def _parameters(function: Callable[..., None]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _walk_arguments(
    result: Verification,
    tokens: Tensor,
    row_start_loc: Tensor,
    max_rows: int,
    parents: Tensor | None,
) -> dict[str, Any]:
    """The tree, and where its result goes."""
    return {
        "out_tokens_ptr": result.tokens,
        "num_tokens_ptr": result.num_tokens,
        "out_rows_ptr": result.rows,
        "tokens_ptr": _contiguous(tokens),
        "row_start_loc_ptr": _contiguous(row_start_loc),
        "parents_ptr": _contiguous(parents),
        "max_rows": max_rows,
        "BLOCK_R": max(16, triton.next_power_of_2(max_rows)),
    }


def _logits_arguments(logits: Tensor, draft_logits: Tensor | None) -> dict[str, Any]:
    for name, tensor in (("logits", logits), ("draft_logits", draft_logits)):
        if tensor is not None and tensor.dtype == torch.float64:
            raise ValueError(f"{name}: the kernels compute in float32, found torch.float64")
    vocab_size = logits.shape[1]
    block_v = min(CHUNK, max(16, triton.next_power_of_2(vocab_size)))
    num_chunks = triton.cdiv(vocab_size, block_v)
    return {
        "logits_ptr": logits,
        "logits_stride": logits.stride(0),
        "draft_logits_ptr": draft_logits,
        "draft_logits_stride": 0 if draft_logits is None else draft_logits.stride(0),
        "num_draft_rows": 0 if draft_logits is None else len(draft_logits),
        "vocab_size": vocab_size,
        "num_chunks": num_chunks,
        "BLOCK_V": block_v,
        "BLOCK_C": triton.next_power_of_2(num_chunks),
    }


def _most_children(
    max_rows: int, parents: Tensor | None, draft_logits: Tensor | None, max_children: int | None
) -> int:
    """Children of one node that are ever tried; only those of proposals cost anything."""
    if parents is None:
        return 1
    others = max(1, max_rows - 1)
    return others if draft_logits is None or max_children is None else min(others, max_children)


def _empty_result(row_start_loc: Tensor, max_rows: int) -> Verification:
    num_requests, device = len(row_start_loc) - 1, row_start_loc.device
    return Verification(
        tokens=torch.empty((num_requests, max_rows), dtype=torch.int64, device=device),
        num_tokens=torch.empty((num_requests,), dtype=torch.int32, device=device),
        rows=torch.empty((num_requests, max_rows), dtype=torch.int64, device=device),
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
