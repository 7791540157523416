"""The predictions as Markdown, as docs/gpu-predictions.md has them: `gpu.py --predictions`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpu_stages.arms import ARMS, BATCHES, PUBLISHED, SHAPES, Arm
from gpu_stages.predict import TREE_CHIPS, TREE_GAINS, Costs, predict, predict_trees
from vllm_specformer.planning.choose import MARGIN

# The V1 baseline is the same on paper.
SHOWN = [arm for arm in ARMS if arm.head is not None]


def tables() -> str:
    """One table per target, then the published acceptance lengths."""
    parts = [_shape(shape) for shape in SHAPES]
    return "\n\n".join([*parts, _published()])


def tree_tables() -> str:
    """Chains and trees on three chips; 8B."""
    lines = [_line("8B", ("temperature", *(f"batch {b}" for b in BATCHES)))]
    lines.append("|" + "---|" * (len(BATCHES) + 2))
    for chip in TREE_CHIPS:
        for temperature in TREE_GAINS:
            cells = (_tree_cell(chip, temperature, batch) for batch in BATCHES)
            lines.append(_line(chip.upper(), (f"{temperature:g}", *cells)))
    return "\n".join(lines)


def _tree_cell(chip: str, temperature: float, batch: int) -> str:
    """The best chain's ratio and K, the best tree's and n; in bold what pays."""
    trees = predict_trees(chip, temperature, batch)
    chain, tree = trees.best(batch, MARGIN)
    one, other = f"{chain.ratio:.2f} (K={chain.count})", f"{tree.ratio:.2f} (n={tree.count})"
    return f"{one} / **{other}**" if trees.pays_at(batch, MARGIN) else f"**{one}** / {other}"


def _shape(shape: str) -> str:
    plain = [predict(shape, ARMS[0], batch).plain for batch in BATCHES]
    lines = [_line(f"{shape.upper()}, {_length(ARMS[1])}", (f"batch {b}" for b in BATCHES))]
    lines.append("|" + "---|" * (len(BATCHES) + 1))
    lines.append(_line("none: step, ms", (f"{ms:.2f}" for ms in plain)))
    return "\n".join([*lines, *(_line(arm.name, _cells(shape, arm)) for arm in SHOWN)])


def _published() -> str:
    arms: Sequence[Arm] = (ARMS[1], *PUBLISHED)
    lines = [_line("8B, published lengths", ("tokens/step", *(f"batch {b}" for b in BATCHES)))]
    lines.append("|" + "---|" * (len(BATCHES) + 2))
    for arm in arms:
        lines.append(_line(arm.name, (f"{arm.length:g}", *_cells("8b", arm))))
    return "\n".join(lines)


def _length(arm: Arm) -> str:
    return f"{arm.length:g} tokens/step"


def _cells(shape: str, arm: Arm) -> Iterable[str]:
    return (_cell(predict(shape, arm, batch), arm) for batch in BATCHES)


def _cell(costs: Costs, arm: Arm) -> str:
    """Draft in milliseconds, θ, and tokens per second over no speculation."""
    return f"{costs.draft:.2f} / {costs.theta:.2f} / **{arm.length / costs.theta:.2f}**"


def _line(head: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join([head, *cells]) + " |"
