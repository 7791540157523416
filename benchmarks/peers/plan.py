"""What is compared, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "models" / "python-target"
RESULTS = ROOT / "benchmarks" / "results" / "peers"
WORK = ROOT / "build" / "peers"

OURS = "specformer"
PEERS = ("eagle3", "peagle", "dflash", "dspark")  # names of the `speculators` library
KINDS = (*PEERS, OURS)
TITLES = {
    "eagle3": "EAGLE-3",
    "peagle": "P-EAGLE",
    "dflash": "DFlash",
    "dspark": "DSpark",
    OURS: "SpecFormer",
}

BUDGETS = (240, 1000, 4000)  # cpu-seconds of training
# Times the library's learning rates, where ours has its own: what was best of those tried in 240
# seconds (docs/peers.md).
RATES: dict[str, float] = {"eagle3": 10, "peagle": 5, "dflash": 5, "dspark": 5, OURS: 1}
TWO_SEEDS = 1000  # budgets up to this one are trained with two seeds
DRAFTED = (2, 4, 8)  # tokens per step, K
TEMPERATURES = (0.0, 0.7, 1.0)


@dataclass(frozen=True)
class Head:
    """One training."""

    kind: str
    budget: int
    seed: int
    rate: float = 1  # times the library's learning rates

    @property
    def name(self) -> str:
        rate = "" if self.rate == 1 else f"-rate{self.rate:g}"
        return f"{self.kind}-{self.budget}-seed{self.seed}{rate}"

    @property
    def key(self) -> tuple[str, int, int, float]:
        return self.kind, self.budget, self.seed, self.rate

    @property
    def is_ours(self) -> bool:
        return self.kind == OURS


def seeds_of(budget: int) -> tuple[int, ...]:
    return (0, 1) if budget <= TWO_SEEDS else (0,)


def heads(
    budgets: tuple[int, ...],
    seeds: tuple[int, ...] | None,
    kinds: tuple[str, ...],
    rates: tuple[float, ...] | None = None,
) -> list[Head]:
    """All trainings that are asked for: the short ones first, a seed of all kinds at a time.

    Other rates than those of `RATES` are for the library's heads.
    """
    return [
        Head(kind, budget, seed, rate)
        for budget in sorted(budgets)
        for seed in (seeds_of(budget) if seeds is None else seeds)
        for kind in kinds
        for rate in (rates if rates and kind != OURS else (RATES[kind],))
    ]
