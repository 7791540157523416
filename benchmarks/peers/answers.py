"""The answers that all heads are trained on, and those that they are replayed on.

Made by the recipe of the bundled pair: the same prompts, the target's own answers. Every stage goes
on where it was stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from peers.plan import ROOT, TARGET, TEMPERATURES
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.target.files import find_target, target_record
from vllm_specformer.training.texts import Texts, read_texts

RECIPE = ROOT / "examples" / "training" / "bundled_pair"
MAX_TOKENS, LONGEST = 160, 1024  # of an answer; of a text
ENGINE = '{"kv_cache_memory_bytes": 536870912, "enforce_eager": true}'
TRAINED = "answers"


def held_out(temperature: float) -> str:
    """Name of the answers at a temperature to the held-out prompts."""
    return f"held_out_{temperature:g}"


def commands(work: Path, prompts: int, held: int) -> Iterator[tuple[str, list[str]]]:
    """What makes the data, as (what there is then, arguments of Python)."""
    corpus, cut = work / "corpus", work / "prompts"
    yield "corpus", [str(RECIPE / "corpus.py"), "--out", str(corpus)]
    yield "prompts", [str(RECIPE / "prompts.py"), "--corpus", str(corpus), "--out", str(cut)]
    distill = ["-m", "vllm_specformer.cli.main", "distill", "--target", str(TARGET)]
    distill += ["--max-tokens", str(MAX_TOKENS), "--engine-args", ENGINE]
    for temperature in TEMPERATURES:
        name = held_out(temperature)
        options = ["--prompts", str(cut / "held_out.jsonl"), "--max-prompts", str(held)]
        options += ["--sampled-share", "0", "--temperature", f"{temperature:g}"]
        yield name, [*distill, *options, "--out", str(work / name)]
    options = ["--prompts", str(cut / "train.jsonl"), "--max-prompts", str(prompts)]
    yield TRAINED, [*distill, *options, "--out", str(work / TRAINED)]


def make(work: Path, prompts: int, held: int) -> None:
    """Make what is missing."""
    for name, command in commands(work, prompts, held):
        done = work / "done" / name
        if done.exists():
            continue
        print(f"[{name}]", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


def read(work: Path, name: str) -> Texts:
    """Answers by their name."""
    place, commit = find_target(str(TARGET), None)
    fingerprint = target_record(str(TARGET), place, commit).fingerprint
    manifest = read_manifest(work / name, fingerprint, False)
    return Texts.collect(read_texts(read_shards(work / name, manifest)), LONGEST)
