"""Start `vllm serve` as a child process, wait until it answers, end it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.serving.process_groups import end_group, signal_group

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 40


class ServerError(SpecFormerError):
    """A server ended early or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server; paths in `command` are relative to where it was started."""

    url: str
    command: str
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    started_in_s: float = 0.0


def free_port() -> int:
    """A port that was free a moment ago; another process could still take it before the server."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def serve_command() -> list[str]:
    """How to call `vllm serve` in this environment (see cli/serve.py)."""
    python, here = Path(sys.executable), Path.cwd()
    # Relative where possible: what is printed and recorded should work in another checkout.
    shown = python.relative_to(here) if python.is_relative_to(here) else python
    return [str(shown), "-m", "vllm_specformer.cli.main", "serve"]


def server_environment() -> dict[str, str]:
    """The environment of a local CPU server: offline, no telemetry, Intel's OpenMP if installed."""
    environment = dict(os.environ)
    # Counters of a user's own servers are in there.
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment |= openmp_preload(environment.get("LD_PRELOAD", ""))
    # vLLM closes a connection after 5 s without a request. A client that sends one just then, as
    # its own benchmark client does after a pause, would lose it.
    environment.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "120")
    # vLLM's ngram runs on Numba, which sets OpenMP's threads to all cores, for PyTorch as well: a
    # server that speculates so would be given more of them than the others it is compared with.
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit():
        environment.setdefault("NUMBA_NUM_THREADS", threads)
    return environment


def openmp_preload(preloaded: str = "") -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, which vLLM asks for when it speculates on a CPU."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if "omp" in preloaded or not library.is_file():
        return {}
    return {"LD_PRELOAD": f"{preloaded}:{library}" if preloaded else str(library)}


@contextlib.contextmanager
def serving(
    options: Sequence[str],
    log: Path,
    *,
    command: Sequence[str] | None = None,
    timeout_s: float = START_TIMEOUT_S,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Run `vllm serve OPTIONS` on a free local port until the block is left, however it is left.

    Args:
        log: file that gets the server's output.
        command: what to run instead of `vllm serve`.
        on_wait: called with the seconds waited so far, about twice a second.

    Raises:
        ServerError: the server ended, or did not answer /health within `timeout_s`.
    """
    port = free_port()
    base = serve_command() if command is None else list(command)
    arguments = [*base, *options, "--host", HOST, "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output, process_group(arguments, output) as process:
        url = f"http://{HOST}:{port}"
        _wait_until_healthy(process, url, log, timeout_s, on_wait)
        yield Server(url, shlex.join(arguments), log, process, time.monotonic() - started)


@contextlib.contextmanager
def process_group(
    arguments: Sequence[str],
    output: int | object,
    stop_timeout_s: float = STOP_TIMEOUT_S,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own and leave no member of it behind."""
    process = subprocess.Popen(
        arguments,
        env=server_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,  # type: ignore[arg-type]
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        try:
            signal_group(process, signal.SIGTERM)
        finally:
            end_group(process, stop_timeout_s)


def _wait_until_healthy(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    timeout_s: float,
    on_wait: Callable[[float], None],
) -> None:
    started = time.monotonic()
    while not _healthy(url):
        waited = time.monotonic() - started
        if process.poll() is not None:
            raise ServerError(f"the server ended with code {process.returncode}:\n{_tail(log)}")
        if waited > timeout_s:
            raise ServerError(f"the server did not answer in {timeout_s:.0f} s:\n{_tail(log)}")
        on_wait(waited)
        time.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(f"  | {line}" for line in lines)
