"""The end of a child process together with the processes that it has started itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

# For what a leader leaves behind: multiprocessing's tracker removes shared memory after its end.
_REST_S = 2.0
_POLL_S = 0.05


def end_group(process: subprocess.Popen[Any], timeout_s: float) -> None:
    """Wait for the leader, which was asked to end, and leave no member of its group behind.

    Args:
        process: started with `start_new_session=True`.
        timeout_s: for the leader. The rest gets SIGTERM then, and soon SIGKILL.
    """
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        signal_group(process, signal.SIGTERM)
        _wait_for_rest(process.pid)
    finally:  # a second Ctrl-C during the wait must not leave the engine running
        signal_group(process, signal.SIGKILL)
        process.wait()
    _wait_for_rest(process.pid)


def signal_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Signal every member, also when the leader has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait_for_rest(group: int) -> None:
    deadline = time.monotonic() + _REST_S
    while _is_running(group) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _is_running(group: int) -> bool:
    """Whether a member runs; those that wait to be reaped, perhaps for ever, do not count."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            # Bytes: the name of a process need not be text.
            state, _, its_group = file.read_bytes().rpartition(b")")[2].split()[:3]
            if int(its_group) == group and state != b"Z":
                return True
    return False
