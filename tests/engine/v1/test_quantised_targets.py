"""Quantised targets, served: the way of docs/quantised-targets.md, and the other formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from support.family_pairs import Pair
from support.paths import HEAD, PROMPTS, TARGET
from support.processor import HAS_AMX, HAS_AVX512
from support.quantised import quantise
from support.served_pairs import served

COMMAND = (sys.executable, "-m", "vllm_specformer.cli.main")
ENGINE = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True, "max_num_seqs": 32}


class Kind(NamedTuple):
    """Arithmetic of the engine; how far states may be from training's; the share of other drafts.

    On a CPU vLLM has products with 4-bit weights in 16-bit arithmetic only: states and near ties
    differ by that. At W8A8 activations are rounded, in vLLM to other numbers than in Transformers.
    """

    dtype: str
    same_states: float
    most_wrong: float


KINDS = {
    "w4a16": Kind("half", 3e-3, 0.01),
    "gptq": Kind("half", 3e-3, 0.01),
    "awq": Kind("half", 3e-3, 0.01),
    "w8a8": Kind("half" if HAS_AMX else "float32", 5e-2, 0.04),
}

# vLLM's build for processors without AVX-512 lacks the operation, with or without speculation.
has_four_bits = pytest.mark.skipif(
    not HAS_AVX512,
    reason="vLLM's products with 4-bit weights want AVX-512",
)


def held_out(target: Path, head: Path) -> Pair:
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[-12:]]
    return Pair(target, head, tuple(tuple(tokenizer(text).input_ids) for text in texts))


@pytest.mark.slow
@has_four_bits
def test_from_a_checkpoint_to_a_served_head(tmp_path: Path) -> None:
    target, answers, head = (tmp_path / name for name in ("target", "answers", "head"))
    quantise(TARGET, target, "w4a16")
    command(
        *("distill", "--target", target, "--prompts", PROMPTS, "--max-prompts", 64),
        *("--max-tokens", 48, "--dtype", "half", "--out", answers),
        *("--engine-args", json.dumps(ENGINE)),
    )
    command(
        *("train", "--target", target, "--data", answers, "--out", head, "--max-steps", 50),
        *("--slots", 4, "--batch-tokens", 512, "--dtype", "float32", "--anchors-per-text", 32),
    )
    command("check", head, "--target", target)
    command(
        *("eval", head, "--target", target, "--prompts", PROMPTS, "--max-prompts", 8),
        *("--max-tokens", 24, "--dtype", "float32"),
    )
    served(held_out(target, head), **KINDS["w4a16"]._asdict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [pytest.param("gptq", marks=has_four_bits), pytest.param("awq", marks=has_four_bits), "w8a8"],
)
def test_a_head_of_the_checkpoint_it_was_quantised_from(scheme: str, tmp_path: Path) -> None:
    quantise(TARGET, tmp_path / "target", scheme)
    outcome = served(held_out(tmp_path / "target", HEAD), **KINDS[scheme]._asdict())
    assert outcome.tokens_per_step > 2


def command(*arguments: Any) -> str:
    """Run a command of `specformer`, which must succeed; what it prints."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
