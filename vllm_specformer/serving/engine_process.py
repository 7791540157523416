"""Start an engine in a process of its own and tell it what to do (see engine_worker.py)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.serving.engine_worker import END_NOW
from vllm_specformer.serving.process_groups import end_group
from vllm_specformer.serving.server import server_environment

WORKER = "vllm_specformer.serving.engine_worker"
_TAIL_LINES = 30
_END_S, _END_NOW_S = 20.0, 3.0


class EngineProcessError(SpecFormerError):
    """The engine does not start, or ended before it had answered."""


class EngineProcess:
    """One engine's process; it waits for its next order without working.

    Its end gives back the device's memory, and vLLM's global state is not shared with another.

    Args:
        engine: arguments of `vllm.LLM`.
        log: file for what vLLM prints; None: our standard error.
        environment: variables beside those of `server_environment`.
    """

    def __init__(
        self,
        engine: Mapping[str, Any],
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._engine, self._log = dict(engine), log
        self._environment = server_environment() | dict(environment or {})

    def __enter__(self) -> EngineProcess:
        """Start it and wait until it is loaded.

        Raises:
            EngineProcessError: it does not start.
        """
        with self._log.open("w") if self._log else contextlib.nullcontext() as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the one who started it
            )
        try:
            self._answer(self._engine)
        except BaseException:
            self._end(now=True)
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._end(now=error is not None)

    def call(self, function: str, **arguments: Any) -> dict[str, Any]:
        """What `function` ("module:name") returns in there for the engine and `arguments`.

        Arguments and result are JSON, so keys of objects come back as strings.

        Raises:
            EngineProcessError: the process ended.
        """
        return self._answer({"function": function, "arguments": arguments})

    def kill(self) -> None:
        """End it at once; a `call` under way in another thread raises EngineProcessError."""
        self._tell(END_NOW)
        end_group(self._process, _END_NOW_S)

    def _answer(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdout is not None
        self._tell(json.dumps(order))
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EngineProcessError(f"vLLM's engine ended with code {code}", f"{self._messages()}")
        content: dict[str, Any] = json.loads(line)
        if "error" in content:
            raise EngineProcessError(f"vLLM does not start: {content['error']}")
        return content

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its answer shows
            print(line, file=self._process.stdin, flush=True)

    def _messages(self) -> str:
        if self._log is None:
            return "its messages stand above, VLLM_LOGGING_LEVEL=INFO shows more"
        tail = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(["the last of its messages:", *tail])

    def _end(self, now: bool) -> None:
        """Let it end its own processes too; by force if that takes long.

        Args:
            now: without vLLM's farewell, because somebody waits behind a Ctrl-C.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if now:
                self._tell(END_NOW)
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        finally:
            end_group(self._process, _END_NOW_S if now else _END_S)
            self._process.stdout.close()
