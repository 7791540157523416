"""Draws the pictures of docs/kernels.md: `python docs/figures/draw.py`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parent
CONTEXT, BLOCK, NOTHING = "#9ecae1", "#fdae6b", "#f2f2f2"
TARGET, DRAFT, REST = "#3182bd", "#fdae6b", "#31a354"


def mask(axes: Axes, title: str, context: int, words: list[str], rows: list[str]) -> None:
    """A block's rows against context and block columns; `words` row by row, bit 0 first."""
    size = len(words)
    cells = np.zeros((size, context + size))
    cells[:, :context] = 1
    for row, word in enumerate(words):
        cells[row, context:] = [2 * int(bit) for bit in word]
    colors = ListedColormap([NOTHING, CONTEXT, BLOCK])
    axes.pcolormesh(cells, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=1.5)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(which="both", length=0)
    axes.set_yticks(np.arange(size) + 0.5, rows, fontsize=8)
    middle = [context / 2] if context else []
    axes.set_xticks([*middle, context + size / 2])
    axes.set_xticklabels([*(["context (paged)"] if context else []), "block"], fontsize=8)
    axes.set_title(title, fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_masks() -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.6), width_ratios=[10, 10, 4.6, 12])
    slots = [f"slot {i}" for i in range(4)]
    mask(axes[0], "mixed head: all ones, context", 6, ["1111"] * 4, slots)
    causal = ["1000", "1100", "1110", "1111"]
    mask(axes[1], "causal verification: lower triangle", 6, causal, [f"t+{i}" for i in range(4)])
    mask(axes[2], "paper's head: context 0", 0, ["1111"] * 4, slots)
    tree = ["100000", "110000", "101000", "110100", "110010", "101001"]
    names = ["root", "a", "b", "a c", "a d", "b c"]
    mask(axes[3], "candidate tree: ancestors", 6, tree, names)
    figure.tight_layout()
    figure.savefig(FOLDER / "masks.png", dpi=110)


def draw_layout() -> None:
    figure, axes = plt.subplots(figsize=(10, 2.9))
    for page, name in enumerate(["block 7", "block 2", "block 5"]):
        left = page * 4.6
        axes.text(left + 2, 2.35, name, ha="center", fontsize=9)
        for token in range(4):
            position = page * 4 + token
            used = position < 10
            for half, label in ((0, "K"), (1, "V")):
                box = Rectangle(
                    (left + token, 1.2 - half * 0.8),
                    0.95,
                    0.75,
                    color=(CONTEXT if used else NOTHING),
                )
                axes.add_patch(box)
                text = f"{label}{position}" if used else ""
                axes.text(left + token + 0.47, 1.55 - half * 0.8, text, ha="center", fontsize=8)
    axes.text(-0.2, 2.9, "block table of the request: 7, 2, 5     context length: 10", fontsize=9)
    axes.text(
        -0.2,
        -0.25,
        "slot mapping of token 9 = block 5 * block size 4 + offset 1 = 21;  "
        "-1 skips a row (padding, K/V kept by nobody)",
        fontsize=9,
    )
    axes.set_xlim(-0.3, 13.6)
    axes.set_ylim(-0.5, 3.2)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(FOLDER / "pages.png", dpi=110)


def draw_residual() -> None:
    p = np.array([0.30, 0.22, 0.16, 0.12, 0.08, 0.05, 0.04, 0.03])
    q = np.array([0.45, 0.10, 0.20, 0.05, 0.10, 0.04, 0.03, 0.03])
    first = 1.0
    second = first + np.clip(p - first * q, 0, None).sum()
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.7), sharey=True)
    titles = (
        "b = 0: before any test",
        "b = 1: one draft rejected",
        f"b = {second:.2f}: two rejected",
    )
    for panel, scale, title in zip(axes, (0.0, first, second), titles, strict=True):
        tokens = np.arange(len(p))
        panel.bar(tokens, p, color=TARGET, alpha=0.35, label="p, the target")
        panel.bar(
            tokens, np.clip(p - scale * q, 0, None), color=REST, width=0.5, label="(p - b q)+"
        )
        panel.step(tokens, scale * q, where="mid", color=DRAFT, linewidth=2, label="b q")
        panel.set_ylim(0, 0.5)
        panel.set_xticks([])
        panel.set_xlabel("tokens", fontsize=8)
        panel.set_title(title, fontsize=9)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "residual.png", dpi=110)


def draw_split() -> None:
    figure, axes = plt.subplots(figsize=(10, 2.4))
    edges = [0, 3, 6, 9, 11]
    for index, (left, right) in enumerate(pairwise(edges)):
        axes.add_patch(Rectangle((left, 1), right - left - 0.06, 0.6, color=CONTEXT))
        axes.text((left + right) / 2, 1.22, f"unit {index}", ha="center", fontsize=9)
        axes.annotate(
            "",
            ((left + right) / 2, 0.5),
            ((left + right) / 2, 0.97),
            arrowprops={"arrowstyle": "->"},
        )
        axes.text((left + right) / 2, 0.25, "max, sum, out", ha="center", fontsize=8)
    axes.add_patch(Rectangle((11.2, 1), 1.5, 0.6, color=BLOCK))
    axes.text(11.95, 1.22, "block", ha="center", fontsize=9)
    axes.annotate("", (11.95, 0.5), (11.95, 0.97), arrowprops={"arrowstyle": "->"})
    axes.text(11.95, 0.25, "max, sum, out", ha="center", fontsize=8)
    axes.text(
        6.3, -0.35, "combine: one softmax over everything the row sees", ha="center", fontsize=9
    )
    axes.text(0, 1.85, "context of one request, as long as it really is", fontsize=9)
    axes.set_xlim(-0.2, 13)
    axes.set_ylim(-0.6, 2.2)
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(FOLDER / "split.png", dpi=110)


if __name__ == "__main__":
    draw_masks()
    draw_layout()
    draw_residual()
    draw_split()
