"""Kill a distillation at many points, each in a child of its own, and finish it in another.

    python -m support.distill.kill_points TARGET PROMPTS WORK      # in tests/

Run as a program of its own: children are forked after the slow imports, before any thread starts.
Prints one JSON object. A *step* is a line of this project's code that runs, so a kill falls before
or after each of them. Of the lines that open, write, sync, rename and lock the first and the last
time they run are all tried; of the others some, evenly spread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from support.distill.fakes import FakeEngine, options
from vllm_specformer.distill import distill as run
from vllm_specformer.distill.encode import Encoder

WATCHED = ("vllm_specformer/data/", "vllm_specformer/distill/")
OFTEN = "vllm_specformer/data/files.py"
POINTS_ELSEWHERE = 15
NEVER = -1


class Letters:
    """A tokenizer with a token per letter, and as its template the messages one after another."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"{message['content']}|" for message in messages)


class Steps:
    """Counts lines as they run, and ends the process with SIGKILL before line `fatal`."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal = fatal
        self.count = 0
        self.in_files: dict[str, tuple[int, int]] = {}

    def watch(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if not any(part in name for part in WATCHED):
            return None
        if event == "line":
            self.count += 1
            if OFTEN in name:
                line = str(frame.f_lineno)
                first, _ = self.in_files.get(line, (self.count, 0))
                self.in_files[line] = first, self.count
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.watch


def in_child(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Run `work` in a forked child: whether it was killed, else what it returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.waitstatus_to_exitcode(status):
        raise SystemExit("a child failed")
    return killed, json.loads(content) if content else None


def main(target: Path, prompts: Path, work: Path) -> None:
    # SIGKILL loses nothing that was written, only a power cut would; waiting for the disk is slow.
    os.fsync = lambda _: None  # type: ignore[assignment]
    encoder = Encoder(Letters(), "not looked at")
    run.load_encoder = lambda *_, **__: encoder  # type: ignore[assignment]

    def distill(name: str, fatal: int | None) -> list[Any]:
        steps, engine = Steps(fatal), FakeEngine(context=400)
        given = options(target, prompts, work / name)
        if fatal != NEVER:
            sys.settrace(steps.watch)
        try:
            run.distill(given, lambda *_: engine, report=lambda _: None)
        finally:
            sys.settrace(None)
        return [steps.count, steps.in_files, len(engine.requests)]

    _, (total, in_files, requests) = in_child(lambda: distill("reference", None))
    spread = range(1, total + 1, max(1, total // POINTS_ELSEWHERE))
    often = [count for first_and_last in in_files.values() for count in first_and_last]
    results = []
    for fatal in sorted({*often, *spread}):
        name = f"killed-{fatal}"
        killed, _ = in_child(lambda name=name, fatal=fatal: distill(name, fatal))
        resumed_killed, (_, __, again) = in_child(lambda name=name: distill(name, NEVER))
        results.append([name, killed, resumed_killed, again])
    print(json.dumps({"total": total, "requests": requests, "results": results}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
