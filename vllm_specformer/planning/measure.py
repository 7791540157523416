"""What a step costs on the machine at hand: two engines, with the head and without, timed by turns.

Only ratios of the two count, and a machine does not run equally fast all the time. So, where both
fit, they take turns at every batch size; each waits while the other works. On a GPU, where an
engine takes the memory it finds, one is done before the other starts.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_specformer.engine.patches.measuring import listing_schedule
from vllm_specformer.serving.engine_process import EngineProcess

_TIMING = "vllm_specformer.planning.timing"
_MOST_VISITS = 12  # of one batch size in a cycle


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Attributes:
        batches: requests in a step.
        counts: drafted tokens per step, 0 among them.
        cycles: rounds over all batch sizes.
        steps, seconds: timed steps of a visit, and the time after which they are enough.
        least_seconds: timed seconds of every figure in a cycle; where steps are short a batch size
            is visited again until it has them.
    """

    batches: Sequence[int]
    counts: Sequence[int]
    cycles: int = 3
    steps: int = 8
    seconds: float = 2.0
    least_seconds: float = 0.5
    max_tokens: int = 128


@dataclass
class Costs:
    """In seconds; by batch size, or batch size and count.

    Attributes:
        plain: a step without the head, the median over all.
        steps, drafts: a step with it, and drafting within: medians of ratios to `plain`, times it.
        prompts: reading one prompt of as many at once, without the head and with it.
    """

    plain: dict[int, float] = field(default_factory=dict)
    prompts: dict[int, tuple[float, float]] = field(default_factory=dict)
    steps: dict[tuple[int, int], float] = field(default_factory=dict)
    drafts: dict[tuple[int, int], float] = field(default_factory=dict)


class Machine:
    """Measures a pair with the engine arguments that its server would have."""

    def __init__(
        self,
        engine_args: dict[str, Any],
        head: Path,
        prompts: Sequence[list[int]],
        settings: Settings,
        logs: Path,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.prompts, self.say, self.logs = settings, prompts, say, logs
        shared = {
            "enable_prefix_caching": False,
            "max_num_seqs": max(*settings.batches, len(settings.counts)),
            "disable_log_stats": False,
            **engine_args,
        }
        if not torch.cuda.is_available():
            # As in a server, where the worker is a process of its own on a CPU.
            shared.setdefault("distributed_executor_backend", "mp")
        speculative = {
            "method": "specformer",
            "model": str(head),
            "num_speculative_tokens": max(settings.counts),
            "num_speculative_tokens_per_batch_size": listing_schedule(list(settings.counts)),
        }
        self.engines = {
            "plain": shared,
            "head": shared | {"speculative_config": speculative},
        }
        self._steps: dict[tuple[str, int, int], list[list[float]]] = {}  # by visit
        self._drafts: dict[tuple[str, int, int], list[float]] = {}
        self._prompts: dict[tuple[str, int], list[float]] = {}

    def measure(self, live: bool) -> tuple[Costs, dict[int, float]]:
        """Costs and, if asked for, tokens per step of a live run by count."""
        if torch.cuda.is_available():
            return self._one_after_the_other(live)
        with self._engine("plain") as plain, self._engine("head") as head:
            self._cycles({"plain": plain, "head": head})
            accepted = self._accepted(head) if live else {}
        return self._costs(), accepted

    def _one_after_the_other(self, live: bool) -> tuple[Costs, dict[int, float]]:
        accepted: dict[int, float] = {}
        for name in self.engines:
            with self._engine(name) as engine:
                self._cycles({name: engine})
                if live and name == "head":
                    accepted = self._accepted(engine)
        return self._costs(), accepted

    @contextlib.contextmanager
    def _engine(self, name: str) -> Iterator[EngineProcess]:
        log = self.logs / f"engine-{name}.log"
        how = "with" if name == "head" else "without"
        self.say(f"starting the engine {how} the head (log: {log})")
        with EngineProcess(self.engines[name], log) as engine:
            yield engine

    def _cycles(self, engines: dict[str, EngineProcess]) -> None:
        """Visit every batch size in every cycle, with the engines taking turns."""
        for cycle in range(self.settings.cycles):
            for batch in self.settings.batches:
                names = " and ".join(engines)
                self.say(f"cycle {cycle + 1} of {self.settings.cycles}: {batch} requests, {names}")
                timed = 0.0
                for visit in range(_MOST_VISITS):
                    timed += min(
                        self._visit(name, engine, batch, cycle + visit)
                        for name, engine in engines.items()
                    )
                    if timed >= self.settings.least_seconds:
                        break

    def _visit(self, name: str, engine: EngineProcess, batch: int, turn: int) -> float:
        """Time steps of every count, every other turn from the last one on.

        Returns:
            The timed seconds of the count that had the fewest.
        """
        counts, steps = list(self.settings.counts), self.settings.steps
        if name == "plain":  # the one that all others are compared with: as many steps as they
            counts, steps = [0], steps * len(counts)
        found = engine.call(
            f"{_TIMING}:times",
            prompts=[self.prompts[place % len(self.prompts)] for place in range(batch)],
            counts=counts[::-1] if turn % 2 else counts,
            steps=steps,
            seconds=self.settings.seconds,
        )
        for text, seconds in found["steps"].items():
            self._steps.setdefault((name, batch, int(text)), []).append(seconds)
            self._drafts.setdefault((name, batch, int(text)), []).append(found["drafts"][text])
        self._prompts.setdefault((name, batch), []).append(found["prompt"])
        return min(map(sum, found["steps"].values()))

    def _accepted(self, engine: EngineProcess) -> dict[int, float]:
        """Tokens per step on the prompts themselves, answered to their end."""
        found = {0: 1.0}
        for count in self.settings.counts:
            if count:
                self.say(f"acceptance with {count} drafted tokens")
                answered = engine.call(
                    f"{_TIMING}:accepted",
                    prompts=list(self.prompts),
                    count=count,
                    max_tokens=self.settings.max_tokens,
                )
                found[count] = answered["tokens_per_step"]
        return found

    def _costs(self) -> Costs:
        costs = Costs()
        for batch in self.settings.batches:
            visits = self._steps["plain", batch, 0]
            plain = list(map(statistics.median, visits))
            costs.plain[batch] = statistics.median(itertools.chain.from_iterable(visits))
            for count in self.settings.counts:
                steps = list(map(statistics.median, self._steps["head", batch, count]))
                costs.steps[batch, count] = costs.plain[batch] * _ratio(steps, plain)
                drafts = self._drafts["head", batch, count]
                costs.drafts[batch, count] = costs.plain[batch] * _ratio(drafts, plain)
            reading = [self._prompts[name, batch] for name in ("plain", "head")]
            without = statistics.median(reading[0])
            costs.prompts[batch] = (without, without * _ratio(reading[1], reading[0]))
        return costs


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the ratios of visits next to each other; of the medians where they are not paired.

    The machine's speed drifts, and visits next to each other have it in common.
    """
    if len(over) == len(under):
        return statistics.median(a / b for a, b in zip(over, under, strict=True))
    return statistics.median(over) / statistics.median(under)
