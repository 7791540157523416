"""`specformer serve` refuses what cannot be served by one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.paths import TARGET


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
