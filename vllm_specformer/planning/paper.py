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
    beam: int = 1,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> list[PlanRow]:
    """What each batch size and number of drafted tokens, or of a tree's nodes, costs and brings.

    Args:
        tokens_per_step: by number of drafted tokens, 0 among them. More than the head has slots
            can only be nodes of a tree, which is as deep as there are slots.
        context: tokens each request has in its cache.
        beam: nodes of a slot that may have children in a tree; 1 for chains.
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
            draft = draft_step(
                head,
                batch,
                min(count, head.slots),
                context,
                context_rows=count + 1,
                beam=beam,
                kv_bytes=kv_bytes,
            )
            drafts[batch, count] = draft.seconds(chip)
            steps[batch, count] = verify(count + 1) + drafts[batch, count]
    return combine(plain, steps, drafts, tokens_per_step)
