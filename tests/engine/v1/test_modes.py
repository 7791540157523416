"""Engines in processes of their own, and a compiled target. Each engine is a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import HEAD, PROMPTS, TARGET

pytestmark = pytest.mark.slow

# Spawned workers import the script anew, hence the guard.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    options, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(dtype="float32", kv_cache_memory_bytes=64 << 20, max_model_len=256,
              max_num_seqs=8, disable_log_stats=False, **options)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    counters = {m.name: m.value for m in llm.get_metrics() if "spec_decode_num" in m.name
                and isinstance(getattr(m, "value", None), int)}
    print("RESULT", json.dumps([[list(o.outputs[0].token_ids) for o in outputs], counters]))

if __name__ == "__main__":
    main()
"""

Result = tuple[list[list[int]], dict[str, int]]


def answers(tmp_path: Path, multiprocessing: bool, eager: bool, speculative: bool) -> Result:
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:8]]
    options = {"model": str(TARGET), "enforce_eager": eager}
    if speculative:
        options["speculative_config"] = {
            "method": "specformer",
            "model": str(HEAD),
            "num_speculative_tokens": 4,
        }
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(options), json.dumps(prompts)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing))},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    tokens, counters = json.loads(lines[0].removeprefix("RESULT "))
    return tokens, counters


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return answers(tmp_path_factory.mktemp("plain"), False, True, speculative=False)[0]


@pytest.mark.parametrize(
    ("multiprocessing", "eager"),
    [(True, True), (False, False), (True, False)],
    ids=["multi-process", "compiled", "multi-process-compiled"],
)
def test_greedy_parity(
    tmp_path: Path, plain: list[list[int]], multiprocessing: bool, eager: bool
) -> None:
    tokens, counters = answers(tmp_path, multiprocessing, eager, speculative=True)
    assert tokens == plain
    assert counters["vllm:spec_decode_num_draft_tokens"] > 0
