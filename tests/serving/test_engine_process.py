"""The engine's process and its pipe, with a stand-in that starts no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_specformer.serving import engine_process
from vllm_specformer.serving.engine_process import EngineProcess, EngineProcessError
from vllm_specformer.serving.server import server_environment

# As a module, for `python -m`: the worker as it is, with another engine.
STAND_IN = """
import os, sys, time
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
        with pytest.raises(EngineProcessError, match="ended with code -9"):
            answer.result(10)


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
