"""One unit of a stage in a process of its own: `run_unit.py ORDER.json RESULT.json`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    order_file, result_file = map(Path, sys.argv[1:])
    order = json.loads(order_file.read_text())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if order["interpreted"]:
        # The tests' own way to run vLLM's V2 runner on a CPU; it means nothing for speed.
        from support.environment import prepare_interpreted_engines

        prepare_interpreted_engines()
    from vllm_specformer.data.files import write_atomic

    stage = importlib.import_module(f"gpu_stages.{order['module']}")
    result = stage.run(order["options"])
    write_atomic(result_file, json.dumps(result).encode())


if __name__ == "__main__":
    main()
