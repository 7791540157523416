"""The heads in vLLM's V1 runner, against no speculation, under equal load.

An engine per head, each in its own process. All are up, one of them works at a time: a round asks
all of them the same, one after another, in an order that turns round from round to round. What a
machine does beside it then meets all of them. cpu-seconds of the engine's process are steadier than
the clock where others compute on the same cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peers import answers
from peers.plan import OURS, RESULTS, TARGET, WORK, Head
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


def serve(heads: dict[str, Path], texts: list[list[int]], args: argparse.Namespace) -> list[Row]:
    """One row per round, load and engine."""
    rows: list[Row] = []
    with ExitStack() as stack:
        engines: dict[str, EngineProcess] = {}
        for kind, place in tqdm(heads.items(), desc="engines", unit="engine"):
            log = args.work / "logs" / f"served-{kind}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            process = EngineProcess(engine_of(place, kind), log, ENVIRONMENT)
            try:
                engines[kind] = stack.enter_context(process)
                ask(engines[kind], texts[:8], 4)  # warm
            except EngineProcessError as error:
                engines.pop(kind, None)
                rows.append({"kind": kind, "failure": str(error).splitlines()[0]})
        turns = [(n, load) for n in range(args.rounds) for load in args.loads]
        for number, load in tqdm(turns, desc="rounds", unit="load"):
            order = list(engines) if number % 2 == 0 else list(reversed(engines))
            for kind in order:
                asked = prompts_of(texts, LOADS[load], number)
                found = ask(engines[kind], asked, load)
                rows.append({"kind": kind, "requests": load, "round": number} | found)
            write_rows(args.out, rows, args)
    return rows


def ask(engine: EngineProcess, prompts: list[list[int]], at_once: int) -> Row:
    return engine.call("peers.load:answer", prompts=prompts, at_once=at_once, max_tokens=MAX_TOKENS)


def write_rows(path: Path, rows: list[Row], args: argparse.Namespace) -> None:
    about = {"budget": args.budget, "seed": args.seed, "K": K, "max_tokens": MAX_TOKENS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(about | {"rows": rows}) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS / "served.json")
    parser.add_argument("--budget", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(SERVED), choices=SERVED)
    parser.add_argument("--loads", type=int, nargs="+", default=list(LOADS), choices=LOADS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    heads = {
        kind: args.work / "heads" / Head(kind, args.budget, args.seed).name for kind in args.kinds
    }
    missing = [str(place) for place in heads.values() if not (place / "training.json").is_file()]
    if missing:
        raise SystemExit(f"not trained yet: {', '.join(missing)}")
    held = answers.read(args.work, answers.held_out(0.0))
    texts = [text.input_ids[: text.spans[0][0]].tolist() for text in held.each()]
    write_rows(args.out, serve({NONE: Path()} | heads, texts, args), args)


if __name__ == "__main__":
    main()
