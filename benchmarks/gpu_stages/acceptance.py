"""Stage c: tokens per step in the engine against the exact replay of its answers on the CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from gpu_stages.kernels import report_of
from support.paths import HEAD, PROMPTS

Options = dict[str, Any]


def run(options: Options) -> Options:
    """`specformer eval --serve`: its rows of engine against replay.

    Args:
        options: `prompts`, `max_tokens`, `num_speculative_tokens`, `engine`.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "eval.json")
        arguments = [
            *("-m", "vllm_specformer.cli.main", "eval", str(HEAD)),
            *("--prompts", str(PROMPTS), "--max-prompts", str(options["prompts"])),
            *("--max-tokens", str(options["max_tokens"]), "--temperature", "0", "1"),
            *("--num-speculative-tokens", str(options["num_speculative_tokens"])),
            *("--device", "cpu", "--dtype", "float32", "--serve", "--json", str(report)),
            *("--engine-args", json.dumps(options["engine"])),
        ]
        # 1 says that engine and replay differ by more than 2%: a result, not a failure.
        return {"engine": report_of(arguments, report, codes=(0, 1))["engine"]}
