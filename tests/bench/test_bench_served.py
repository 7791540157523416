"""`specformer bench` end to end: real servers, vLLM's client, a second call that goes on."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import HEAD, ROOT, TARGET
from vllm_specformer.bench.enlarge import enlarge

PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
}


def bench(head: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_specformer.cli.main", "bench", str(head)]
    small = ["--prompts", str(PROMPTS), "--out", str(out), "--max-tokens", "16"]
    engine = ["--engine-args", json.dumps(ENGINE), "--requests-per-slot", "2"]
    return subprocess.run(
        [*command, *small, *engine, *more],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def lines_of(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "bench.csv").open() as file:
        return {(line["arm"], line["concurrency"]): line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_arms_under_load(tmp_path: Path) -> None:
    head = enlarge(TARGET, HEAD, tmp_path / "heavy", 30_000_000, 8).head
    out = tmp_path / "out"
    schedule = tmp_path / "schedule.json"
    schedule.write_text("[[1, 2, 4], [3, 64, 0]]")
    first = ["--arms", "schedule", "--schedule", str(schedule)]
    found = bench(head, out, *first, "--repeats", "1", "--concurrency", "1", "4")
    assert found.returncode == 0, found.stderr[-3000:]
    lines = lines_of(out)
    assert set(lines) == {(arm, at) for arm in ("none", "schedule") for at in ("1", "4")}
    for line in lines.values():
        assert line["same_output"] == "1.0"  # fp32, greedy: token for token
        assert float(line["tokens_per_second"]) > 0
    assert float(lines["schedule", "1"]["tokens_per_step"]) > 1.5
    # At 4 at a time the schedule drafts only while the last requests finish.
    assert float(lines["schedule", "4"]["tokens_per_step"]) < 1.6
    # The second call finds what is there, and measures the new arm alone.
    more = ["--arms", "ngram", "schedule", "--schedule", str(schedule)]
    kept = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    found = bench(head, out, *more, "--repeats", "1", "--concurrency", "1", "4")
    assert found.returncode == 0, found.stderr[-3000:]
    assert "4 of 6 measurements are there" in found.stderr
    assert "starting ngram" in found.stderr
    assert "starting schedule" not in found.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert ("ngram", "4") in lines_of(out)


@pytest.mark.slow
def test_servers_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lookup = {"method": "ngram", "prompt_lookup_max": 2, "num_speculative_tokens": 2}
    own = ["--arms", "none", "--speculative-config", f"mine={json.dumps(lookup)}"]
    load = ["--together", "--repeats", "2", "--concurrency", "2"]
    found = bench(HEAD, out, "--target", str(TARGET), *own, *load)
    assert found.returncode == 0, found.stderr[-3000:]
    order = [line for line in found.stderr.splitlines() if line.startswith("[")]
    arms = [line.split(" at a time, ")[1].split(":")[0] for line in order]
    assert arms == ["none", "mine", "mine", "none"]
    assert lines_of(out)["mine", "2"]["same_output"] == "1.0"
