"""The heads in vLLM's V1 runner, against no speculation, under equal load.

An engine per head, each in its own process. All are up, one of them works at a time: a round asks
all of them the same, one after another, in an order that turns round from round to round. What a
machine does beside it then meets all of them. cpu-seconds of the engine's process are steadier than
the clock where others compute on the same cores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peers.plan import OURS, TARGET
from vllm_specformer.data.files import write_atomic
from vllm_specformer.serving.engine_process import EngineProcess, EngineProcessError

NONE = "none"
SERVED = ("eagle3", "peagle", "dflash", OURS)  # vLLM has DSpark in its V2 runner only
LOADS = {1: 5, 4: 12, 16: 32, 64: 72}  # requests at a time -> requests of a round
K, MAX_TOKENS, ROUNDS = 4, 64, 3
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
ENGINE: dict[str, Any] = {
    "model": str(TARGET),
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 27,
    "max_num_seqs": max(LOADS),
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
Row = dict[str, Any]


def engine_of(place: Path, kind: str) -> dict[str, Any]:
    """Arguments of the engine that drafts with a head; without one of `NONE`."""
    if kind == NONE:
        return ENGINE
    speculative: dict[str, Any] = {"model": str(place), "num_speculative_tokens": K}
    if kind == OURS:
        speculative["method"] = OURS
    return ENGINE | {"speculative_config": speculative}


def prompts_of(texts: Sequence[list[int]], count: int, round_: int) -> list[list[int]]:
    """Prompts of a round, other ones each time."""
    first = round_ * count
    return [texts[(first + i) % len(texts)] for i in range(count)]


@dataclass
class Store:
    """The rows so far, in a file.

    Attributes:
        about: whose heads they are.
    """

    path: Path
    about: Row
    rows: list[Row] = field(default_factory=list)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.about | {"K": K, "max_tokens": MAX_TOKENS, "rows": self.rows}
        write_atomic(self.path, (json.dumps(content) + "\n").encode())


def compare(
    heads: dict[str, Path],
    texts: list[list[int]],
    loads: Sequence[int],
    rounds: int,
    logs: Path,
    store: Store,
) -> None:
    """One row per round, load and engine."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        both = {NONE: Path()} | heads
        for kind, place in tqdm(both.items(), desc="engines", unit="engine"):
            process = EngineProcess(
                engine_of(place, kind), logs / f"served-{kind}.log", ENVIRONMENT
            )
            try:
                engines[kind] = stack.enter_context(process)
                ask(engines[kind], texts[:8], 4)  # warm
            except EngineProcessError as error:
                engines.pop(kind, None)
                store.rows.append({"kind": kind, "failure": str(error).splitlines()[0]})
        turns = [(number, load) for number in range(rounds) for load in loads]
        for number, load in tqdm(turns, desc="rounds", unit="load"):
            for kind in list(engines) if number % 2 == 0 else list(reversed(engines)):
                found = ask(engines[kind], prompts_of(texts, LOADS[load], number), load)
                store.rows.append({"kind": kind, "requests": load, "round": number} | found)
            store.write()


def ask(engine: EngineProcess, prompts: list[list[int]], at_once: int) -> Row:
    return engine.call("peers.load:answer", prompts=prompts, at_once=at_once, max_tokens=MAX_TOKENS)
