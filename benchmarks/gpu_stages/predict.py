"""What stage d should show on an H200, from bytes and operations, before anything is measured.

The roofline is `vllm_specformer.planning`'s: every part of a step takes the longer of moving its
bytes and doing its arithmetic. Added here: what the other methods' drafts do, the sampler's passes
over the logits, and a fixed time per kernel launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gpu_stages.arms import ARMS, BATCHES, CONTEXT, PUBLISHED, Arm
from gpu_stages.shapes import MARKOV_RANK, SCORED_TOKENS, TARGETS
from vllm_specformer.candidates import BEAM
from vllm_specformer.planning.chips import CHIPS, Chip
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.roofline import (
    Step,
    Work,
    attention,
    draft_step,
    matmul,
    target_step,
)
from vllm_specformer.planning.trees import Trees
from vllm_specformer.shapes import HeadShape, TargetShape

CHIP = Chip("NVIDIA H200", 4.3e12, 770e12, "ceilings measured on one: copy, bf16 matrix products")
# Between kernels of a replayed graph; `benchmarks/kernels.py` assumes the same.
LAUNCH_SECONDS = 2e-6
# Kernels of a decoder layer after fusion: norms, products, rotation, K/V store, attention.
LAYER_LAUNCHES = 10
# Around the layers: embedding, final norm, logits, sampling, preparation of inputs.
PASS_LAUNCHES = 8
# Ours, as tests/engine/v2/test_launches.py counts them: before the graph, and in it.
STAGE_LAUNCHES, DRAFT_LAUNCHES = 4, 36
# More with a gated Markov term: the gates, and every further slot, as each is chosen by itself.
GATE_LAUNCHES, SLOT_LAUNCHES = 3, 5
# vLLM's V2 sampler copies logits to float32 and reads the copy.
SAMPLED_BYTES = 2 + 4 + 4


TREE_CHIPS = ("h100", "h200", "b200")
# Tokens per step of the bundled pair by drafts of a chain (best ones, drawn ones) and by nodes of a
# tree at temperatures 0 and 1.
TREE_GAINS: dict[float, tuple[dict[int, float], dict[int, float]]] = {
    0.0: (
        {0: 1.0, 2: 2.45, 4: 3.21, 8: 3.61},
        {2: 2.46, 4: 3.29, 6: 3.74, 8: 3.99, 11: 4.21, 16: 4.46, 23: 4.70, 32: 4.87, 46: 4.99,
         63: 5.12},
    ),
    1.0: (
        {0: 1.0, 2: 1.94, 4: 2.17, 8: 2.22},
        {2: 1.89, 4: 2.23, 6: 2.41, 8: 2.54, 11: 2.69, 16: 2.83, 23: 2.97, 32: 3.07, 46: 3.19,
         63: 3.26},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one step without speculation, and of verification and draft with it."""

    plain: float
    verify: float
    draft: float

    @property
    def theta(self) -> float:
        """Tokens per step over speed-up: how much longer a speculating step takes."""
        return (self.verify + self.draft) / self.plain


def predict(shape: str, arm: Arm, batch: int, context: int = CONTEXT) -> Costs:
    """Costs of one arm at one batch."""
    target = TargetShape.from_config(TARGETS[shape].config())
    plain = _target_ms(target, batch, 1, context)
    if arm.head is None:
        return Costs(plain, plain, 0.0)
    verify = _target_ms(target, batch, arm.num_tokens + 1, context)
    step, launches = draft(arm.head, target, batch, arm.num_tokens, context)
    return Costs(plain, verify, _ms(step, launches))


def draft(
    head: str, target: TargetShape, batch: int, drafts: int, context: int
) -> tuple[Step, int]:
    """Work of one draft and the kernels it launches."""
    return _DRAFTS[head](target, batch, drafts, context)


def _target_ms(target: TargetShape, batch: int, rows: int, context: int) -> float:
    step = target_step(target, batch, rows, context)
    parts = step.parts | {"sampling": _sampling(batch * rows, target.vocab)}
    return _ms(Step(parts), target.layers * LAYER_LAUNCHES + PASS_LAUNCHES)


def _ms(step: Step, launches: int) -> float:
    return 1e3 * (step.seconds(CHIP) + launches * LAUNCH_SECONDS)


def _sampling(rows: int, vocabulary: int) -> Work:
    return Work(rows * vocabulary * SAMPLED_BYTES, 0)


def _best(rows: int, vocabulary: int, scored: int) -> Work:
    """Best of the scored logits; fewer than the vocabulary are first spread over it."""
    passes = 1 if scored == vocabulary else 2
    return Work(rows * vocabulary * 2 * passes, 0)


def _specformer(scored: int | None) -> Callable[[TargetShape, int, int, int], tuple[Step, int]]:
    def work(target: TargetShape, batch: int, drafts: int, context: int) -> tuple[Step, int]:
        tokens = scored or target.vocab
        head = replace(HeadShape.default_for(target), scored=tokens)
        step = draft_step(head, batch, drafts, context)
        # Our head takes the best of the scored tokens and maps it, without spreading.
        parts = step.parts | {"best": Work(batch * drafts * tokens * 2, 0)}
        markov = GATE_LAUNCHES + (drafts - 1) * SLOT_LAUNCHES
        return Step(parts), STAGE_LAUNCHES + DRAFT_LAUNCHES + markov

    return work


def _layer(
    target: TargetShape, batch: int, rows: int, context: int, reads: int | None = None
) -> dict[str, Work]:
    """One decoder layer over `rows` of each request, whose attention reads `reads` features."""
    count, size = batch * rows, target.hidden
    queries, keys = target.heads * target.head_dim, target.kv_heads * target.head_dim
    products = matmul(count, reads or size, queries + 2 * keys, 2, 2)
    products += matmul(count, queries, size, 2, 2)
    products += matmul(count, size, 2 * target.intermediate, 2, 2)
    products += matmul(count, target.intermediate, size, 2, 2)
    return {
        "products": products,
        "attention": attention(batch, rows, context, target, 2) + Work(4 * count * keys, 0),
    }


def _logits(target: TargetShape, rows: int, scored: int) -> dict[str, Work]:
    return {
        "logits": matmul(rows, target.hidden, scored, 2, 2),
        "best": _best(rows, target.vocab, scored),
    }


def _eagle3(target: TargetShape, batch: int, drafts: int, context: int) -> tuple[Step, int]:
    """One pass over the verified rows, then one over the newest token for each further draft."""
    size = target.hidden
    rows = drafts + 1
    parts = {"combine": matmul(batch * rows, 3 * size, size, 2, 2)}
    for number in range(drafts):
        layer = _layer(target, batch, 1 if number else rows, context, 2 * size)
        work = layer | _logits(target, batch, SCORED_TOKENS)
        parts |= {f"{name} {number}": part for name, part in work.items()}
    return Step(parts), drafts * (LAYER_LAUNCHES + PASS_LAUNCHES)


def _peagle(target: TargetShape, batch: int, drafts: int, context: int) -> tuple[Step, int]:
    """Four layers once, over the verified rows and a masked row for each further draft."""
    size, rows = target.hidden, 2 * drafts
    parts = {"combine": matmul(batch * (drafts + 1), 3 * size, size, 2, 2)}
    for number in range(4):
        layer = _layer(target, batch, rows, context, None if number else 2 * size)
        parts |= {f"{name} {number}": part for name, part in layer.items()}
    parts |= _logits(target, batch * drafts, SCORED_TOKENS)
    return Step(parts), 4 * LAYER_LAUNCHES + PASS_LAUNCHES


def _dflash(target: TargetShape, batch: int, drafts: int, context: int) -> tuple[Step, int]:
    return _blocks(target, batch, drafts, context, drafts + 1)


def _dspark(target: TargetShape, batch: int, drafts: int, context: int) -> tuple[Step, int]:
    """DFlash's blocks, then a Markov term for each draft in turn."""
    step, launches = _blocks(target, batch, drafts, context, drafts)
    markov = matmul(batch, MARKOV_RANK, target.vocab, 2, 2) + _best(batch, target.vocab, 0)
    return Step(step.parts | {"markov": markov.times(drafts)}), launches + 4 * drafts


def _blocks(
    target: TargetShape, batch: int, drafts: int, context: int, rows: int
) -> tuple[Step, int]:
    """Context K/V of the verified rows for five layers, and the layers over a masked block."""
    size, keys = target.hidden, target.kv_heads * target.head_dim
    new = batch * (drafts + 1)
    store = matmul(new, 5 * size, size, 2, 2) + matmul(new, size, 5 * 2 * keys, 2, 2)
    parts = {"context": store}
    for number in range(5):
        layer = _layer(target, batch, rows, context)
        parts |= {f"{name} {number}": part for name, part in layer.items()}
    parts |= _logits(target, batch * drafts, target.vocab)
    return Step(parts), 6 * LAYER_LAUNCHES + PASS_LAUNCHES


_DRAFTS: dict[str, Callable[[TargetShape, int, int, int], tuple[Step, int]]] = {
    "specformer": _specformer(None),
    "specformer-32k": _specformer(SCORED_TOKENS),
    "eagle3": _eagle3,
    "peagle": _peagle,
    "dflash": _dflash,
    "dspark": _dspark,
}


def predict_trees(chip: str, temperature: float, batch: int) -> Trees:
    """Chains and trees of the default head on the 8B target, at one batch; no launches."""
    target = TargetShape.from_config(TARGETS["8b"].config())
    head = HeadShape.default_for(target)
    # The shares of its peaks that `CHIP` was measured at.
    sheet = CHIPS["h200"]
    shares = (
        CHIP.bytes_per_second / sheet.bytes_per_second,
        CHIP.flops_per_second / sheet.flops_per_second,
    )
    of_chains, of_trees = TREE_GAINS[temperature]
    costs = partial(
        rows_on_paper, CHIPS[chip].derated(*shares), target, head, [batch], context=CONTEXT
    )
    return Trees(temperature, costs(of_chains), costs(of_chains | of_trees, beam=BEAM))


def row(shape: str, arm: Arm, batch: int) -> dict[str, Any]:
    """One row of stage d as predicted; milliseconds, and ratios of tokens per second."""
    costs = predict(shape, arm, batch)
    return {
        "shape": shape,
        "arm": arm.name,
        "batch": batch,
        "plain_ms": round(costs.plain, 3),
        "verify_ms": round(costs.verify, 3),
        "draft_ms": round(costs.draft, 3),
        "theta": round(costs.theta, 3),
        "ratio": round(arm.length / costs.theta, 3),
    }


def rows() -> list[dict[str, Any]]:
    """Every row of stage d; the published lengths on the 8B shape alone."""
    equal = [row(s, arm, batch) for s in TARGETS for arm in ARMS for batch in BATCHES]
    return equal + [row("8b", arm, batch) for arm in PUBLISHED for batch in BATCHES]
