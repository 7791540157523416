"""The arms of the serving benchmark and the processes they run in."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = "examples/models/python-target"
HEAD = "examples/models/python-specformer"
BASELINE = "none"
ARMS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "specformer": {"method": "specformer", "model": HEAD},
    "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 3},
}
MAX_CONCURRENCY = 16


class Arm:
    """An engine's process; it is idle except while `run` waits for its answer."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        self.log = ROOT / "build" / f"bench-{name}.log"
        speculative = ARMS[name]
        self.options: dict[str, Any] = {
            "model": TARGET,
            "dtype": args.dtype,
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": MAX_CONCURRENCY,
            "kv_cache_memory_bytes": 256 << 20,
            "enable_prefix_caching": False,  # a repeated round has to do the whole work again
            "disable_log_stats": False,
        }
        if speculative is not None:
            tokens = {"num_speculative_tokens": args.num_speculative_tokens}
            self.options["speculative_config"] = speculative | tokens
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(args.threads),
            "NUMBA_NUM_THREADS": str(args.threads),  # ngram's Numba would raise OpenMP's to all
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        # vLLM asks for Intel's OpenMP when it speculates on a CPU; every arm gets it.
        library = Path(sys.prefix) / "lib" / "libiomp5.so"
        if library.is_file():
            self.environment.setdefault("LD_PRELOAD", str(library))

    def __enter__(self) -> Arm:
        print(f"loading {self.name} ...", file=sys.stderr)
        self.log.parent.mkdir(exist_ok=True)
        worker = ROOT / "benchmarks" / "serving_worker.py"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(worker), json.dumps(self.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def run(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"the engine '{self.name}' ended:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
