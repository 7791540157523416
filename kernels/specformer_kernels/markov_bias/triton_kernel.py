"""The Markov term of a slot's logits in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specformer_kernels.markov_bias.reference import FEW_ROWS, check_arguments


# Logits and gates of a slot are aligned or not whatever the number of requests; tokens need not be.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["previous_ptr"])
def _markov_bias_kernel(
    out_ptr,  # [R, N] contiguous
    logits_ptr,  # [R, N]
    previous_ptr,  # [R] int32 or int64
    embed_ptr,  # [V, RANK] contiguous
    lm_head_ptr,  # [N, RANK] contiguous
    gates_ptr,  # [R, RANK]
    num_rows,
    num_scored,
    num_tokens,
    logits_stride_r,
    gates_stride_r,
    RANK: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows per program
    BLOCK_N: tl.constexpr,  # scored tokens per program
    BLOCK_K: tl.constexpr,  # of the rank, per product
):
    # Neighbouring programs share a tile of lm_head: all but the first find it in the cache.
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_place = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_scored = b_row < num_rows, b_place < num_scored
    mask = is_row[:, None] & is_scored[None, :]
    # Before the product, which waits for the entries of `embed`, and those for the tokens.
    logits_ptrs = logits_ptr + b_row[:, None] * logits_stride_r + b_place[None, :]
    b_logit = tl.load(logits_ptrs, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_N]
    b_token = tl.load(previous_ptr + b_row, mask=is_row, other=0).to(tl.int64)
    # A CUDA graph has rows without a request, and nobody says what token those hold.
    is_token = is_row & (b_token >= 0) & (b_token < num_tokens)

    b_term = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for first in range(0, RANK, BLOCK_K):
        b_k = first + tl.arange(0, BLOCK_K)
        in_rank = b_k < RANK
        b_head = tl.load(
            lm_head_ptr + b_place[:, None] * RANK + b_k[None, :],
            mask=is_scored[:, None] & in_rank[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        b_earlier = tl.load(
            embed_ptr + b_token[:, None] * RANK + b_k[None, :],
            mask=is_token[:, None] & in_rank[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_K]
        if HAS_GATES:
            b_gate = tl.load(
                gates_ptr + b_row[:, None] * gates_stride_r + b_k[None, :],
                mask=is_row[:, None] & in_rank[None, :],
                other=0.0,
            )
            b_gated = b_earlier.to(tl.float32) * b_gate.to(tl.float32)
            b_earlier = b_gated.to(b_head.dtype)  # as PyTorch rounds it
        b_term = tl.dot(b_earlier, tl.trans(b_head), b_term, input_precision="ieee")

    b_out = (b_logit.to(tl.float32) + b_term).to(b_logit.dtype)
    tl.store(out_ptr + b_row[:, None] * num_scored + b_place[None, :], b_out, mask=mask)


def tile_sizes(rows: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of tables of `dtype`: two for all batches, so that few variants are compiled.

    As few rows as `tl.dot` takes, and beyond them as many as may share one pass over lm_head. Few
    tokens, since a small batch has nothing else to fill a GPU with.
    """
    # float32 multiplies without tensor cores, all of a product's rank in one thread.
    if dtype == torch.float32:
        return {"BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_K": 16}
    block_r, block_n = (16, 128) if rows <= FEW_ROWS else (64, 64)
    block_k = min(64, max(16, triton.next_power_of_2(rank)))
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_K": block_k}


def markov_bias(
    logits: Tensor,
    previous: Tensor,
    embed: Tensor,
    lm_head: Tensor,
    gates: Tensor | None = None,
) -> Tensor:
    """Launch the kernel: one program per tile of rows and scored tokens. No host sync.

    Shapes and dtypes as in `specformer_kernels.markov_bias.markov_bias`, float64 excluded.
    """
    check_arguments(logits, previous, embed, lm_head, gates)
    for name, tensor in (("logits", logits), ("embed", embed)):
        if tensor.dtype == torch.float64:
            raise ValueError(f"{name}: the kernel computes in float32, found torch.float64")
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if not out.numel():
        return out
    scored, rank = lm_head.shape
    rows = logits.reshape(-1, scored)
    gate_rows = None if gates is None else gates.reshape(-1, rank)
    tiles = tile_sizes(len(rows), rank, embed.dtype)
    grid = (triton.cdiv(len(rows), tiles["BLOCK_R"]), triton.cdiv(scored, tiles["BLOCK_N"]))
    with torch.cuda.device_of(logits):
        _markov_bias_kernel[grid](
            out,
            rows,
            previous.reshape(-1).contiguous(),
            embed,
            lm_head,
            gate_rows,
            len(rows),
            scored,
            len(embed),
            rows.stride(0),
            0 if gate_rows is None else gate_rows.stride(0),
            RANK=rank,
            HAS_GATES=gates is not None,
            **tiles,
        )
    return out
