"""The inputs of a draft step in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepInputs(NamedTuple):
    """A verified batch of r requests and t rows; S state rows. Tensors may be longer than that.

    All but `temperature` are int32 or int64.
    """

    query_start_loc: Tensor  # [r + 1], first row of each request, then t
    positions: Tensor  # [t]
    slot_mapping: Tensor  # [t], slots of the paged cache
    idx_mapping: Tensor  # [r], state row of each request
    num_sampled: Tensor  # [r], tokens that the step added to the text
    num_rejected: Tensor  # [r], drafts that it refused
    last_sampled: Tensor  # [S], by state row
    next_prefill_tokens: Tensor  # [S], by state row
    temperature: Tensor  # float32 [S], by state row
    seeds: Tensor  # [S], by state row
    # [r], row of each request's last accepted token; None: `num_rejected` rows before its last.
    last_rows: Tensor | None = None


class DraftBuffers(NamedTuple):
    """What a draft step of at most R requests, T context rows and K slots reads."""

    context_positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]
    anchor_rows: Tensor  # int64 [R]
    anchor_positions: Tensor  # int64 [R]
    context_lens: Tensor  # int64 [R], tokens up to the anchor, itself included
    bonus_tokens: Tensor  # int64 [R]
    sample_pos: Tensor  # int64 [R * K]
    sample_idx_mapping: Tensor  # int64 [R * K]
    idx_mapping: Tensor  # int64 [R]
    temperature: Tensor  # float32 [S], by state row
    seeds: Tensor  # int64 [S], by state row


def check_arguments(
    step: StepInputs, buffers: DraftBuffers, num_reqs: int, num_tokens: int
) -> None:
    """Raise ValueError, naming the argument, where shapes or dtypes break the contract."""
    rows, requests = len(buffers.slot_mapping), len(buffers.anchor_rows)
    states, samples = len(buffers.temperature), len(buffers.sample_pos)
    if not 0 <= num_reqs <= requests or not 0 <= num_tokens <= rows:
        raise ValueError(
            f"num_reqs, num_tokens: expected at most {requests}, {rows}, found {num_reqs}, "
            f"{num_tokens}"
        )
    if not requests or samples % requests:
        raise ValueError(f"sample_pos: expected a multiple of {requests} rows, found {samples}")
    least = {"query_start_loc": num_reqs + 1, "positions": num_tokens, "slot_mapping": num_tokens}
    least |= dict.fromkeys(("idx_mapping", "num_sampled", "num_rejected"), num_reqs)
    least |= dict.fromkeys(("last_sampled", "next_prefill_tokens", "temperature", "seeds"), states)
    least["last_rows"] = num_reqs
    for name, tensor in step._asdict().items():
        if name != "last_rows" or tensor is not None:
            _check(name, tensor, least[name], _INTEGERS)
    least = dict.fromkeys(DraftBuffers._fields, requests)
    least |= {"context_positions": rows, "slot_mapping": rows, "seeds": states}
    least |= {"sample_pos": samples, "sample_idx_mapping": samples}
    for name, tensor in buffers._asdict().items():
        _check(name, tensor, least[name], (torch.int64,))


_INTEGERS = (torch.int32, torch.int64)


def _check(name: str, tensor: Tensor, least: int, integers: tuple[torch.dtype, ...]) -> None:
    wanted = (torch.float32,) if name == "temperature" else integers
    if tensor.dtype not in wanted:
        raise ValueError(f"{name}: expected {' or '.join(map(str, wanted))}, found {tensor.dtype}")
    if tensor.dim() != 1 or len(tensor) < least or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected at least {least} contiguous entries, found shape "
            f"{list(tensor.shape)}, strides {tensor.stride()}"
        )


def draft_inputs(step: StepInputs, buffers: DraftBuffers, num_reqs: int, num_tokens: int) -> None:
    """Fill the buffers; arguments as in `specformer_kernels.draft_inputs.draft_inputs`."""
    check_arguments(step, buffers, num_reqs, num_tokens)
    buffers.temperature.copy_(step.temperature[: len(buffers.temperature)])
    buffers.seeds.copy_(step.seeds[: len(buffers.seeds)])
    buffers.context_positions[:num_tokens].copy_(step.positions[:num_tokens])
    buffers.slot_mapping[:num_tokens].copy_(step.slot_mapping[:num_tokens])
    buffers.slot_mapping[num_tokens:].fill_(-1)

    state = step.idx_mapping[:num_reqs].long()
    rows = (step.query_start_loc[1 : num_reqs + 1] - 1 - step.num_rejected[:num_reqs]).long()
    if step.last_rows is not None:
        rows = step.last_rows[:num_reqs].long()
    positions = step.positions[rows]
    bonus = torch.where(
        step.num_sampled[:num_reqs] > 0,
        step.last_sampled[state].long(),
        step.next_prefill_tokens[state].long(),
    )
    slots = len(buffers.sample_pos) // len(buffers.anchor_rows)
    draws = positions[:, None] + torch.arange(1, slots + 1, device=positions.device)
    _fill(buffers.anchor_rows, rows, 0)
    _fill(buffers.anchor_positions, positions, 0)
    _fill(buffers.context_lens, positions + 1, 1)
    _fill(buffers.bonus_tokens, bonus, 0)
    _fill(buffers.sample_pos, draws.flatten(), 0)
    _fill(buffers.sample_idx_mapping, state.repeat_interleave(slots), -1)
    _fill(buffers.idx_mapping, state, -1)


def _fill(buffer: Tensor, values: Tensor, inert: int) -> None:
    buffer[: len(values)].copy_(values)
    buffer[len(values) :].fill_(inert)
