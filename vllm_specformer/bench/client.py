"""vLLM's own benchmark client (`vllm bench serve`) in a process that stays.

Importing it takes ten seconds, and a comparison calls it a hundred times. So one process imports it
once and takes the arguments of each call as a line of JSON; the load it generates, and everything
it measures, are vLLM's.

    python -m vllm_specformer.bench.client
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.data.files import refusal, refused
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.serving.server import server_environment

_TAIL_LINES = 30


class ClientError(SpecFormerError):
    """vLLM's client failed; the message holds the end of what it printed."""


class Client:
    """The client's process; it reads nothing and computes nothing while it waits."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Client:
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=server_environment(),
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def measure(self, arguments: Sequence[str], result: Path) -> dict[str, Any]:
        """What `vllm bench serve ARGUMENTS` saves; `result` is the file it uses for that.

        Raises:
            ClientError: it ended, or stopped with an error.
        """
        result.unlink(missing_ok=True)
        saved = ["--save-result", "--save-detailed", "--result-dir", str(result.parent)]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = [*arguments, *saved, "--result-filename", result.name]
        print(json.dumps(call), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        number = refusal(ClientError(answer))
        if number is not None:
            result.unlink(missing_ok=True)
            raise refused(result, number)
        if answer != "done" or not result.is_file():
            tail = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            raise ClientError("\n".join([f"vllm bench serve failed: {answer}", *tail]))
        content: dict[str, Any] = json.loads(result.read_bytes())
        result.unlink()
        return content


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    for line in sys.stdin:
        try:
            serve.main(parser.parse_args(json.loads(line)))
            answer = "done"
        except Exception as error:  # told to the caller, who decides
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
