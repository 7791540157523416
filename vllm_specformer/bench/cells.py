"""One measurement: an arm, a concurrency, a round; kept in a file as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_specformer.bench.arms import Arm
from vllm_specformer.bench.client import ClientError
from vllm_specformer.data.files import write_atomic
from vllm_specformer.places import lasting_model
from vllm_specformer.serving.counts import DraftCounts


@dataclass(frozen=True)
class Key:
    """Where a measurement stands; rounds count from 0."""

    round: int
    concurrency: int
    arm: str

    @property
    def file(self) -> str:
        return f"round{self.round}-{self.arm}-at{self.concurrency}.json"


@dataclass(frozen=True)
class Cell:
    """What a round of requests took and what the server counted meanwhile.

    Attributes:
        speculative: the arm's `--speculative-config`.
        seconds: from the first request to the last answer.
        tpot_ms, ttft_ms: mean time per output token after the first, and to the first.
        accepted_at: drafts accepted up to each position.
        lengths: tokens of each answer, in the order of the prompts.
        draft_seconds, draft_steps: time in the proposer and its calls; None where the server does
            not count them.
        texts: digest of each answer, in the order of the prompts.
        load: the machine's load average over the last minute, when it began.
    """

    round: int
    concurrency: int
    arm: str
    speculative: dict[str, Any] | None
    requests: int
    seconds: float
    output_tokens: int
    tpot_ms: float
    ttft_ms: float
    drafts: int
    drafted: int
    accepted: int
    accepted_at: list[int]
    draft_seconds: float | None
    draft_steps: int | None
    lengths: list[int]
    texts: list[str]
    load: float

    @property
    def key(self) -> Key:
        return Key(self.round, self.concurrency, self.arm)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens a request gains per step, also where some steps draft nothing.

        Its first token comes from the prompt's own step. Of the others, those accepted came along
        with one that a step was made for.
        """
        decoded = self.output_tokens - self.requests
        return decoded / max(1, decoded - self.accepted)


def make_cell(key: Key, arm: Arm, saved: dict[str, Any], counts: DraftCounts, load: float) -> Cell:
    """A measurement out of what vLLM's client saved.

    Args:
        counts: the increase of the server's counters over the measurement.

    Raises:
        ClientError: requests failed.
    """
    wanted = len(saved["generated_texts"])
    errors = [error for error in saved["errors"] if error]
    if errors or saved["completed"] != saved["num_prompts"]:
        first = errors[0].strip().splitlines()[-1] if errors else "some were left out"
        raise ClientError(
            f"{key.arm} at concurrency {key.concurrency}: {saved['completed']} of "
            f"{saved['num_prompts']} requests were answered ({first})"
        )
    return Cell(
        **asdict(key),
        speculative=arm.speculative,
        requests=wanted,
        seconds=saved["duration"],
        output_tokens=saved["total_output_tokens"],
        tpot_ms=saved["mean_tpot_ms"],
        ttft_ms=saved["mean_ttft_ms"],
        drafts=counts.drafts,
        drafted=counts.drafted,
        accepted=counts.accepted,
        accepted_at=list(counts.accepted_at),
        draft_seconds=counts.draft_seconds,
        draft_steps=counts.draft_steps,
        lengths=saved["output_lens"],
        texts=[hashlib.sha256(t.encode()).hexdigest()[:16] for t in saved["generated_texts"]],
        load=load,
    )


class Cells:
    """The measurements under a directory, by their place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def find(self, key: Key, arm: Arm) -> Cell | None:
        """The measurement at this place, if there is one and it is of the same arm."""
        path = self.directory / key.file
        if not path.is_file():
            return None
        cell = Cell(**json.loads(path.read_bytes()))
        same = lasting_model(cell.speculative) == lasting_model(arm.speculative)
        return cell if same else None

    def keep(self, cell: Cell) -> None:
        content = json.dumps(asdict(cell), indent=1) + "\n"
        write_atomic(self.directory / cell.key.file, content.encode())


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def all_keys(rounds: int, concurrencies: list[int], arms: list[Arm]) -> Iterator[Key]:
    for number in range(rounds):
        for concurrency in concurrencies:
            for arm in arms:
                yield Key(number, concurrency, arm.name)
