"""The engine's process and its pipe, with a stand-in that starts no vLLM."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.processes import is_alive
from vllm_specformer.serving import engine_process
from vllm_specformer.serving.engine_process import EngineProcess, EngineProcessError
from vllm_specformer.serving.server import server_environment

# As a module, for `python -m`: the worker as it is, with another engine.
STAND_IN = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from vllm_specformer.serving import engine_worker

class Engine:
    def __init__(self, arguments):
        time.sleep(arguments.get("load_s", 0))
        if "fault" in arguments:
            raise ValueError(arguments["fault"])
        print("loaded, as vLLM says on standard output", flush=True)
        self.llm = self.llm_engine = self.engine_core = self
        self.farewell = arguments.get("farewell")

    def shutdown(self):
        open(self.farewell, "w").close()

def add(engine, first, second):
    return {"sum": first + second}

def die(engine):
    print("out of memory", file=sys.stderr, flush=True)
    os._exit(3)

def sleep(engine, seconds):
    time.sleep(seconds)

def work(place):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(place).write_text(str(os.getpid()))
    time.sleep(600)

def start_worker(engine, place):
    # As vLLM's, but it minds neither SIGTERM nor the end of its parent.
    multiprocessing.get_context("spawn").Process(target=work, args=[place]).start()
    while not Path(place).exists() or not Path(place).read_text():
        time.sleep(0.01)
    return {}

if __name__ == "__main__":
    engine_worker.Engine = Engine
    engine_worker.main()
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stand_in_worker.py").write_text(STAND_IN)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(engine_process, "WORKER", "stand_in_worker")
    return "stand_in_worker"


def test_it_answers_and_is_shut_down(worker: str, tmp_path: Path) -> None:
    farewell, log = tmp_path / "farewell", tmp_path / "log"
    with EngineProcess({"farewell": str(farewell)}, log) as engine:
        assert engine.call(f"{worker}:add", first=1, second=2) == {"sum": 3}
        assert engine.call(f"{worker}:add", first=[1], second=[2]) == {"sum": [1, 2]}
        assert not farewell.exists()
    assert farewell.exists()
    assert log.read_text() == "loaded, as vLLM says on standard output\n"


def test_what_vllm_refuses_is_told(worker: str) -> None:
    with (
        pytest.raises(EngineProcessError, match="vLLM does not start: no such model"),
        EngineProcess({"fault": "no such model"}),
    ):
        pass


def test_an_engine_that_ends_shows_its_last_messages(
    worker: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with EngineProcess({}, tmp_path / "log") as engine, pytest.raises(EngineProcessError) as caught:
        engine.call(f"{worker}:die")
    assert "ended with code 3" in str(caught.value)
    assert str(caught.value).endswith("\nout of memory")
    with EngineProcess({}) as engine, pytest.raises(EngineProcessError, match="stand above"):
        engine.call(f"{worker}:die")
    assert "out of memory" in capfd.readouterr().err


def test_it_is_killed_at_work(worker: str, tmp_path: Path) -> None:
    with EngineProcess({}, tmp_path / "log") as engine, ThreadPoolExecutor() as executor:
        answer = executor.submit(engine.call, f"{worker}:sleep", seconds=60)
        time.sleep(0.2)
        engine.kill()
        with pytest.raises(EngineProcessError, match="ended with code 1"):
            answer.result(10)


@pytest.mark.parametrize("busy", [True, False])
def test_an_interruption_ends_the_workers_too(worker: str, busy: bool, tmp_path: Path) -> None:
    """At once, and without the farewell; nothing is left when the block is."""
    place, farewell = tmp_path / "pid", tmp_path / "farewell"
    times: list[float] = []

    def interrupted() -> None:
        with EngineProcess({"farewell": str(farewell)}, tmp_path / "log") as engine:
            engine.call(f"{worker}:start_worker", place=str(place))
            if busy:
                order = {"function": f"{worker}:sleep", "arguments": {"seconds": 600}}
                engine._tell(json.dumps(order))
                time.sleep(0.2)
            times.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not is_alive(int(place.read_text()))
    assert time.monotonic() - times[0] < 10
    assert not farewell.exists()


@pytest.mark.parametrize("end", ["of itself", "killed", "left"])
def test_no_worker_is_left_behind(
    worker: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "_END_S", 1.0)  # Python itself waits for such a worker
    place, farewell = tmp_path / "pid", tmp_path / "farewell"
    with (
        contextlib.suppress(EngineProcessError),
        EngineProcess({"farewell": str(farewell)}, tmp_path / "log") as engine,
    ):
        engine.call(f"{worker}:start_worker", place=str(place))
        if end == "of itself":
            engine.call(f"{worker}:die")
        if end == "killed":
            engine.kill()
            assert not is_alive(int(place.read_text()))
    assert not is_alive(int(place.read_text()))
    assert farewell.exists() == (end == "left")


@pytest.mark.parametrize("busy", ["loading", "answering", "waiting"])
def test_it_does_not_outlive_its_parent(worker: str, busy: str, tmp_path: Path) -> None:
    """Its standard input is closed when the parent ends, however that happens."""
    farewell = tmp_path / "farewell"
    process = subprocess.Popen(
        [sys.executable, "-m", worker],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=server_environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        load = 600 if busy == "loading" else 0
        print(f'{{"farewell": "{farewell}", "load_s": {load}}}', file=process.stdin, flush=True)
        if busy != "loading":
            assert process.stdout.readline() == '{"ready": true}\n'
        if busy == "answering":
            order = f'{{"function": "{worker}:sleep", "arguments": {{"seconds": 600}}}}'
            print(order, file=process.stdin, flush=True)
        time.sleep(1)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == (0 if busy == "waiting" else 1)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert farewell.exists() == (busy == "waiting")
