"""What a draft step reads of a verified batch, written to the buffers that a CUDA graph reads."""

from __future__ import annotations

from specformer_kernels.draft_inputs import reference
from specformer_kernels.draft_inputs.reference import DraftBuffers, StepInputs

__all__ = ["DraftBuffers", "StepInputs", "draft_inputs"]


def draft_inputs(step: StepInputs, buffers: DraftBuffers, num_reqs: int, num_tokens: int) -> None:
    """Fill the buffers for `num_reqs` requests and `num_tokens` context rows, in place.

    A request's anchor is its last accepted row; its bonus token is what was sampled after it, or,
    in the middle of a prompt, the prompt's next token. A draw is keyed by the position before the
    token it draws, as the target's own: slot `i` draws for the position `anchor + 2 + i`.

    All rows past the batch are made inert: slots and request rows are -1, anchors and tokens 0. So
    a graph captured for more rows writes no K/V and draws nothing for them.

    Triton on a GPU, one launch and no host sync; PyTorch elsewhere.

    Args:
        step: the batch, see `StepInputs`.
        buffers: see `DraftBuffers`.
        num_reqs: requests of the batch, at most the buffers' R.
        num_tokens: context rows of the batch, at most the buffers' T.

    Raises:
        ValueError: a shape or dtype breaks the contract; the message names the argument.
    """
    if buffers.slot_mapping.is_cuda:
        from specformer_kernels.draft_inputs import triton_kernel

        triton_kernel.draft_inputs(step, buffers, num_reqs, num_tokens)
    else:
        reference.draft_inputs(step, buffers, num_reqs, num_tokens)
