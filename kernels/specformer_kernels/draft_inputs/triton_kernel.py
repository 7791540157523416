"""The inputs of a draft step in Triton. Imports triton: load only to launch."""

# A kernel's arguments are untyped but for its constexprs, which are upper case by Triton's custom.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specformer_kernels.draft_inputs.reference import DraftBuffers, StepInputs, check_arguments

BLOCK = 256  # rows per program


# Counts change from step to step, and a specialisation of each would compile while serving.
@triton.jit(
    do_not_specialize=[
        "num_reqs", "num_tokens", "max_reqs", "max_tokens", "num_states", "num_slots",
    ],
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr", "positions_ptr", "slot_mapping_ptr", "idx_mapping_ptr",
        "num_sampled_ptr", "num_rejected_ptr", "last_rows_ptr",
    ],
)  # fmt: skip
def _draft_inputs_kernel(
    query_start_loc_ptr,  # [num_reqs + 1]
    positions_ptr,  # [num_tokens]
    slot_mapping_ptr,  # [num_tokens]
    idx_mapping_ptr,  # [num_reqs]
    num_sampled_ptr,  # [num_reqs]
    num_rejected_ptr,  # [num_reqs]
    last_sampled_ptr,  # [num_states]
    next_prefill_tokens_ptr,  # [num_states]
    temperature_ptr,  # float32 [num_states]
    seeds_ptr,  # [num_states]
    last_rows_ptr,  # [num_reqs], or None
    context_positions_out_ptr,  # int64 [max_tokens]
    slot_mapping_out_ptr,  # int64 [max_tokens]
    anchor_rows_out_ptr,  # int64 [max_reqs]
    anchor_positions_out_ptr,  # int64 [max_reqs]
    context_lens_out_ptr,  # int64 [max_reqs]
    bonus_tokens_out_ptr,  # int64 [max_reqs]
    sample_pos_out_ptr,  # int64 [max_reqs * num_slots]
    sample_idx_mapping_out_ptr,  # int64 [max_reqs * num_slots]
    idx_mapping_out_ptr,  # int64 [max_reqs]
    temperature_out_ptr,  # float32 [num_states]
    seeds_out_ptr,  # int64 [num_states]
    num_reqs,
    num_tokens,
    max_reqs,
    max_tokens,
    num_states,
    num_slots,
    BLOCK: tl.constexpr,
):
    b_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)

    is_token = b_row < num_tokens
    b_slot = tl.load(slot_mapping_ptr + b_row, mask=is_token, other=-1)
    tl.store(slot_mapping_out_ptr + b_row, b_slot, mask=b_row < max_tokens)
    b_position = tl.load(positions_ptr + b_row, mask=is_token)
    tl.store(context_positions_out_ptr + b_row, b_position, mask=is_token)

    is_state = b_row < num_states
    b_temperature = tl.load(temperature_ptr + b_row, mask=is_state)
    tl.store(temperature_out_ptr + b_row, b_temperature, mask=is_state)
    tl.store(seeds_out_ptr + b_row, tl.load(seeds_ptr + b_row, mask=is_state), mask=is_state)

    is_request, is_written = b_row < num_reqs, b_row < max_reqs
    b_state = tl.load(idx_mapping_ptr + b_row, mask=is_request, other=-1).to(tl.int64)
    tl.store(idx_mapping_out_ptr + b_row, b_state, mask=is_written)
    if last_rows_ptr is None:
        b_end = tl.load(query_start_loc_ptr + 1 + b_row, mask=is_request, other=1)
        b_rejected = tl.load(num_rejected_ptr + b_row, mask=is_request, other=0)
        b_anchor = (b_end - 1 - b_rejected).to(tl.int64)
    else:
        b_anchor = tl.load(last_rows_ptr + b_row, mask=is_request, other=0).to(tl.int64)
    b_anchor_position = tl.load(positions_ptr + b_anchor, mask=is_request, other=0).to(tl.int64)
    tl.store(anchor_rows_out_ptr + b_row, b_anchor, mask=is_written)
    tl.store(anchor_positions_out_ptr + b_row, b_anchor_position, mask=is_written)
    tl.store(context_lens_out_ptr + b_row, b_anchor_position + 1, mask=is_written)

    b_num_sampled = tl.load(num_sampled_ptr + b_row, mask=is_request, other=0)
    has_sampled = is_request & (b_num_sampled > 0)
    b_sampled = tl.load(last_sampled_ptr + b_state, mask=has_sampled, other=0)
    b_prompt = tl.load(
        next_prefill_tokens_ptr + b_state, mask=is_request & (b_num_sampled <= 0), other=0
    )
    b_bonus = tl.where(has_sampled, b_sampled.to(tl.int64), b_prompt.to(tl.int64))
    tl.store(bonus_tokens_out_ptr + b_row, b_bonus, mask=is_written)

    for slot in range(num_slots):
        b_sample = b_row.to(tl.int64) * num_slots + slot
        b_draw = tl.where(is_request, b_anchor_position + 1 + slot, 0)
        tl.store(sample_pos_out_ptr + b_sample, b_draw, mask=is_written)
        tl.store(sample_idx_mapping_out_ptr + b_sample, b_state, mask=is_written)


def draft_inputs(step: StepInputs, buffers: DraftBuffers, num_reqs: int, num_tokens: int) -> None:
    """Launch the kernel: one program per `BLOCK` rows of the longest buffer. No host sync.

    Arguments as in `specformer_kernels.draft_inputs.draft_inputs`.
    """
    check_arguments(step, buffers, num_reqs, num_tokens)
    max_reqs, max_tokens = len(buffers.anchor_rows), len(buffers.slot_mapping)
    num_states = len(buffers.temperature)
    rows = max(max_reqs, max_tokens, num_states)
    with torch.cuda.device_of(buffers.slot_mapping):
        _draft_inputs_kernel[(triton.cdiv(rows, BLOCK),)](
            *step,
            *buffers,
            num_reqs,
            num_tokens,
            max_reqs,
            max_tokens,
            num_states,
            len(buffers.sample_pos) // max_reqs,
            BLOCK=BLOCK,
        )
