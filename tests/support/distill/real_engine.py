"""Distil with vLLM in this process: undisturbed, then killed midway and finished.

    python -m support.distill.real_engine TARGET PROMPTS WORK      # in tests/

vLLM is imported once and every run is a forked child, which saves half a minute per run. Prints the
seconds each run took.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
ENGINE_ARGS = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True, "max_num_seqs": 16}
TIMEOUT_S = 200.0


def start(arguments: list[str]) -> int:
    """The command in a forked child; its process id."""
    pid = os.fork()
    if pid:
        return pid
    from vllm_specformer.cli.main import main

    sys.stdout = sys.stderr
    code = 1
    try:
        code = main(arguments)
    finally:
        os._exit(code)


def wait(pid: int, until: Path | None = None) -> int:
    """Wait for the end of a child, or for a file to appear; its exit code or minus the signal."""
    for _ in range(int(TIMEOUT_S / 0.01)):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until is not None and until.exists():
            os.kill(pid, signal.SIGKILL)
            until = None
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise SystemExit("a run took too long")


def run(target: str, prompts: str, work: Path) -> None:
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401  the slow imports, before any fork

    def command(name: str) -> list[str]:
        return [
            *("distill", "--target", target, "--prompts", prompts, "--out", str(work / name)),
            *("--dtype", "float32", "--max-model-len", "256", "--max-tokens", "48"),
            *(
                "--shard-size",
                "6",
                "--chat-template",
                str(work / "template"),
                "--engine-args",
                json.dumps(ENGINE_ARGS),
            ),
        ]

    codes, seconds = {}, {}
    for name, out, until in (
        ("whole", "whole", None),
        ("killed", "killed", work / "killed" / "shard-00001.parquet"),
        ("resumed", "killed", None),
    ):
        started = time.monotonic()
        codes[name] = wait(start(command(out)), until)
        seconds[name] = round(time.monotonic() - started, 1)
        if name == "killed":
            left = sorted(path.name for path in (work / out).glob("shard-*"))
    print(json.dumps({"codes": codes, "seconds": seconds, "left": left}))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
