"""`specformer serve` refuses what cannot be served by one message."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TARGET
from vllm_specformer.cli.serve import serve


def test_a_wrong_head_is_told_without_a_traceback(tmp_path: Path) -> None:
    head = tmp_path / "mistyped" / "head"
    speculative = {"method": "specformer", "model": str(head), "num_speculative_tokens": 4}
    options = (str(TARGET), "--speculative-config", json.dumps(speculative))
    command = [sys.executable, "-m", "vllm_specformer.cli.main", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"specformer serve: speculative config: 'model' is '{head}': there is no such directory; "
        "check the path"
    )
    assert "note: --gpu-memory-utilization 0." in done.stderr


def test_what_is_added_stands_before_the_users_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an option given twice, abbreviated even, vLLM takes the last; the model comes first."""
    monkeypatch.setattr("vllm.entrypoints.cli.main.main", lambda: None)
    monkeypatch.setattr("importlib.metadata.version", importlib.metadata.version)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv("LD_PRELOAD", "libgomp.so")  # restored behind the test
    own = ["--gpu-memory-util", "0.3"]
    for first in (["model"], []):
        assert serve([*first, *own]) == 0
        assert sys.argv[: 3 + len(first)] == ["vllm", "serve", *first, "--gpu-memory-utilization"]
        assert sys.argv[-2:] == own
