"""The inputs of a draft step: kernel against reference, reference against a loop in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specformer_kernels.draft_inputs import DraftBuffers, StepInputs, reference, triton_kernel
from torch import Tensor

MAX_REQUESTS, MAX_TOKENS, STATES, SLOTS = 7, 600, 9, 3
POISON = -77  # in everything that a step must write


def make_step(lengths: list[int], seed: int = 0) -> StepInputs:
    """Requests of so many rows: some in their prompt, some with refused drafts, rubbish behind."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    requests, tokens = len(lengths), sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rejected = torch.tensor([int(drawn(0, length, 1)) for length in lengths], dtype=torch.int64)
    sampled = drawn(0, 2, requests)
    rejected = torch.where(sampled > 0, rejected, 0)
    tail = torch.full((5,), POISON)
    return StepInputs(
        query_start_loc=torch.cat([starts, tail]).int(),
        positions=torch.cat([drawn(0, 1000, tokens), tail]),
        slot_mapping=torch.cat([drawn(-1, 5000, tokens), tail]),
        idx_mapping=torch.cat([torch.randperm(STATES, generator=generator)[:requests], tail]).int(),
        num_sampled=torch.cat([sampled, tail]).int(),
        num_rejected=torch.cat([rejected, tail]).int(),
        last_sampled=drawn(0, 2**40, STATES),
        next_prefill_tokens=drawn(0, 50000, STATES).int(),
        temperature=torch.rand(STATES, generator=generator),
        seeds=drawn(-(2**62), 2**62, STATES),
    )


def on(step: StepInputs, device: str) -> StepInputs:
    return StepInputs(*(t if t is None else t.to(device) for t in step))


def make_buffers() -> DraftBuffers:
    def poisoned(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((size,), POISON, dtype=dtype)

    return DraftBuffers(
        context_positions=poisoned(MAX_TOKENS),
        slot_mapping=poisoned(MAX_TOKENS),
        anchor_rows=poisoned(MAX_REQUESTS),
        anchor_positions=poisoned(MAX_REQUESTS),
        context_lens=poisoned(MAX_REQUESTS),
        bonus_tokens=poisoned(MAX_REQUESTS),
        sample_pos=poisoned(MAX_REQUESTS * SLOTS),
        sample_idx_mapping=poisoned(MAX_REQUESTS * SLOTS),
        idx_mapping=poisoned(MAX_REQUESTS),
        temperature=poisoned(STATES, torch.float32),
        seeds=poisoned(STATES),
    )


def by_hand(step: StepInputs, requests: int, tokens: int) -> dict[str, list[float]]:
    """Request by request, as the docstring says it."""
    row = {name: tensor.tolist() for name, tensor in step._asdict().items() if tensor is not None}
    found: dict[str, list[float]] = {name: [] for name in DraftBuffers._fields}
    found["context_positions"] = row["positions"][:tokens]
    found["slot_mapping"] = row["slot_mapping"][:tokens] + [-1] * (MAX_TOKENS - tokens)
    found["temperature"], found["seeds"] = row["temperature"], row["seeds"]
    for i in range(MAX_REQUESTS):
        live = i < requests
        state = row["idx_mapping"][i] if live else -1
        anchor = row["query_start_loc"][i + 1] - 1 - row["num_rejected"][i] if live else 0
        if live and "last_rows" in row:
            anchor = row["last_rows"][i]
        position = row["positions"][anchor] if live else 0
        source = (
            row["last_sampled" if row["num_sampled"][i] > 0 else "next_prefill_tokens"]
            if (live)
            else [0]
        )
        found["anchor_rows"].append(anchor)
        found["anchor_positions"].append(position)
        found["context_lens"].append(position + 1)
        found["bonus_tokens"].append(source[state])
        found["idx_mapping"].append(state)
        found["sample_pos"] += [position + 1 + slot if live else 0 for slot in range(SLOTS)]
        found["sample_idx_mapping"] += [state] * SLOTS
    return found


BATCHES = [[1], [4, 1, 300], [5] * 7, [290, 290], []]


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("name", ["reference", "kernel"])
@pytest.mark.parametrize("walked", [False, True], ids=["chains", "trees"])
def test_fills_the_buffers(lengths: list[int], name: str, walked: bool, kernel_device: str) -> None:
    step, requests, tokens = make_step(lengths), len(lengths), sum(lengths)
    if walked:  # some row of the request's own
        first = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:requests]
        last = first + torch.tensor([length // 2 for length in lengths], dtype=torch.int64)
        step = step._replace(last_rows=last)
    device = kernel_device if name == "kernel" else "cpu"
    buffers = DraftBuffers(*(t.to(device) for t in make_buffers()))
    fill = triton_kernel.draft_inputs if name == "kernel" else reference.draft_inputs
    fill(on(step, device), buffers, requests, tokens)
    expected = by_hand(step, requests, tokens)
    for field, tensor in buffers._asdict().items():
        found = tensor.cpu().tolist()
        if field == "context_positions":  # those past the batch are not looked up
            assert found[tokens:] == [POISON] * (MAX_TOKENS - tokens)
            found = found[:tokens]
        assert found == expected[field], field


def test_a_smaller_batch_leaves_nothing_of_a_larger_one(kernel_device: str) -> None:
    buffers = DraftBuffers(*(t.to(kernel_device) for t in make_buffers()))
    for lengths in BATCHES:
        step = on(make_step(lengths, seed=len(lengths)), kernel_device)
        triton_kernel.draft_inputs(step, buffers, len(lengths), sum(lengths))
        assert (buffers.slot_mapping[sum(lengths) :] == -1).all()
        assert (buffers.sample_idx_mapping[len(lengths) * SLOTS :] == -1).all()
        assert (buffers.idx_mapping[len(lengths) :] == -1).all()
        assert (buffers.anchor_rows[len(lengths) :] == 0).all()


@pytest.mark.parametrize(
    ("part", "field", "change", "named"),
    [
        ("step", "positions", lambda t: t.float(), "positions: expected torch.int32 or"),
        ("buffers", "seeds", lambda t: t.int(), "seeds: expected torch.int64"),
        ("step", "temperature", lambda t: t.double(), "temperature: expected torch.float32"),
        ("step", "query_start_loc", lambda t: t[:2], "query_start_loc: expected at least"),
        ("step", "last_sampled", lambda t: t[:, None], "last_sampled: expected at least"),
        ("step", "seeds", lambda t: t.repeat(2)[::2], "seeds: expected at least"),
        ("buffers", "anchor_positions", lambda t: t[:3], "anchor_positions: expected at least"),
        ("buffers", "sample_pos", lambda t: t[:20], "sample_pos: expected a multiple"),
        ("buffers", "anchor_rows", lambda t: t[:1], "num_reqs, num_tokens: expected at most"),
    ],
)
def test_bad_arguments_are_named(
    part: str, field: str, change: Callable[[Tensor], Tensor], named: str
) -> None:
    arguments: dict[str, Any] = {"step": make_step([2, 3]), "buffers": make_buffers()}
    arguments[part] = arguments[part]._replace(**{field: change(getattr(arguments[part], field))})
    for implementation in (reference, triton_kernel):
        with pytest.raises(ValueError, match=named):
            implementation.draft_inputs(**arguments, num_reqs=2, num_tokens=5)
