"""Rows of a plan on paper: the roofline's costs in the place of measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_specformer.planning.chips import Chip
from vllm_specformer.planning.choose import PlanRow, combine
from vllm_specformer.planning.roofline import draft_step, target_step
from vllm_specformer.shapes import HeadShape, TargetShape


def rows_on_paper(
    chip: Chip,
    target: TargetShape,
    head: HeadShape,
    batches: Sequence[int],
    tokens_per_step: Mapping[int, float],
    context: int,
    *,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> list[PlanRow]:
    """What each batch size and number of drafted tokens costs and brings.

    Args:
        tokens_per_step: by number of drafted tokens, 0 among them.
        context: tokens each request has in its cache.
        weight_bytes, kv_bytes: of the target; the head is bf16.
    """
    plain, steps, drafts = {}, {}, {}
    for batch in batches:

        def verify(rows: int, batch: int = batch) -> float:
            step = target_step(
                target, batch, rows, context, weight_bytes=weight_bytes, kv_bytes=kv_bytes
            )
            return step.seconds(chip)

        plain[batch] = verify(1)
        for count in tokens_per_step:
            draft = draft_step(head, batch, count, context, kv_bytes=kv_bytes).seconds(chip)
            drafts[batch, count] = draft
            steps[batch, count] = verify(count + 1) + draft
    return combine(plain, steps, drafts, tokens_per_step)
