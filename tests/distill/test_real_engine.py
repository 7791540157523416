"""The command with real vLLM engines on the bundled target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.distill.fakes import chat, rows_of, write_lines
from support.paths import PROMPTS, ROOT
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import Conversation
from vllm_specformer.serving.server import serving

REAL_ENGINE = "support.distill.real_engine"
TEXTS, CHATS = 22, 8
# One function after another, as the target was trained: it ends many within a few tokens.
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    records: list[dict[str, Any]] = [{"prompt": text} for text in texts[:TEXTS]]
    records += [chat(*texts[TEXTS + i :: CHATS][:2]) for i in range(CHATS)]
    return write_lines(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", records)


@torch.no_grad()
def assert_greedy(rows: list[Conversation], target: Path) -> None:
    """Every answer token is what Transformers finds most probable at its place."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for row in rows:
        best = model(torch.tensor([list(row.input_ids)])).logits[0].argmax(-1).tolist()
        for start, end in zip(row.answer_starts, row.answer_ends, strict=True):
            assert best[start - 1 : end - 1] == list(row.input_ids[start:end]), row.id


def test_killed_and_resumed(target: Path, prompts: Path, tmp_path: Path) -> None:
    """A run killed midway and given again ends with the rows of an undisturbed one."""
    (tmp_path / "template").write_text(TEMPLATE)
    result = subprocess.run(
        [sys.executable, "-m", REAL_ENGINE, str(target), str(prompts), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT / "tests",
    )
    assert result.returncode == 0, result.stderr[-6000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["codes"] == {"whole": 0, "killed": -9, "resumed": 0}, result.stderr[-6000:]
    assert 2 <= len(found["left"]) < 5
    whole, resumed = read_manifest(tmp_path / "whole"), read_manifest(tmp_path / "killed")
    rows = rows_of(tmp_path / "whole")
    assert [row.id for row in rows] == list(range(TEXTS + CHATS))
    assert rows_of(tmp_path / "killed") == rows
    assert resumed == whole
    assert 0 < whole.counts.sampled < len(rows)
    assert max(len(row.answer_starts) for row in rows) == 2
    assert_greedy([row for row in rows if row.temperature == 0], target)


@pytest.mark.slow
def test_from_a_real_server(target: Path, prompts: Path, tmp_path: Path) -> None:
    """vLLM's server gives the greedy rows that the offline engine gives, by token ids."""
    served = [
        *(str(target), "--served-model-name", "python", "--dtype", "float32"),
        *("--max-model-len", "256", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
    ]
    command = [
        *(sys.executable, "-m", "vllm_specformer.cli.main", "distill", "--target", str(target)),
        *("--prompts", str(prompts), "--max-tokens", "32", "--shard-size", "8"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def distill(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--out", str(tmp_path / out), *more],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            env=environment,
        )

    with serving(served, tmp_path / "server.log") as server:
        wrong = distill("wrong", "--engine", server.url)
        assert wrong.returncode == 2
        assert "does not serve" in wrong.stderr
        assert "'python'; if that is the target, name it with --served-model" in wrong.stderr
        result = distill("out", "--engine", server.url, "--served-model", "python")
        assert result.returncode == 0, result.stderr[-4000:]
    rows = rows_of(tmp_path / "out")
    assert [row.id for row in rows] == list(range(TEXTS + CHATS))
    assert read_manifest(tmp_path / "out").context == 256
    assert_greedy([row for row in rows if row.temperature == 0], target)
    gone = distill("gone", "--engine", server.url)
    assert gone.returncode == 2
    assert "is the server up" in gone.stderr
    assert "Traceback" not in gone.stderr
