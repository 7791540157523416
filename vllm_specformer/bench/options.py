"""What a benchmark is asked to do, checked before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_specformer.errors import SpecFormerError

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (2, 4, 8)
# Set by an option of ours, or by the comparison itself.
_OWN = ("model", "host", "port", "speculative_config", "served_model_name", "disable_log_stats")


@dataclass(frozen=True)
class Options:
    """The command's arguments; see `cli/bench.py` for their meaning."""

    head: Path
    out: Path
    prompts: Sequence[Path]
    target: str | None = None
    revision: str | None = None
    num_speculative_tokens: Sequence[int] = COUNTS
    arms: Sequence[str] | None = None
    schedule: Path | None = None
    speculative_config: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    concurrency: Sequence[int] = CONCURRENCIES
    repeats: int = 3
    requests_per_slot: int = 4
    max_tokens: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    together: bool = False
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.engine_args:
            if name.replace("-", "_") in _OWN:
                raise SpecFormerError(
                    f"--engine-args: {name!r} is set by the benchmark; leave it out"
                )

    def max_model_len(self, otherwise: int) -> int:
        """The longest text the servers take, in tokens."""
        given = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
        return int(given.get("max_model_len", otherwise))

    def requests(self, concurrency: int, available: int) -> int:
        """Requests of a measurement: some for every slot, at least 8 in all, each prompt once.

        Raises:
            SpecFormerError: more slots than prompts.
        """
        if available < concurrency:
            raise SpecFormerError(
                f"--concurrency {concurrency}: needs as many distinct prompts, and --prompts has "
                f"{available} that fit; give more, or a lower concurrency"
            )
        return min(available, max(8, self.requests_per_slot * concurrency))


def server_arguments(engine_args: Mapping[str, Any], max_num_seqs: int) -> list[str]:
    """The options of `vllm serve` that all arms share.

    Prefix caching is off unless asked for, so that a repeated round does the whole work again.
    """
    merged: dict[str, Any] = {"max_num_seqs": max_num_seqs, "enable_prefix_caching": False}
    merged |= {name.replace("-", "_"): value for name, value in engine_args.items()}
    arguments = ["--disable-uvicorn-access-log"]
    for name, value in merged.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return arguments
