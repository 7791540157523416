"""A group of processes ends whole, whatever else runs on the machine."""

from __future__ import annotations

import subprocess
import sys
import time

from support.processes import is_alive
from vllm_specformer.serving.process_groups import end_group

# Linux cuts a name after 15 bytes, perhaps within a letter.
NAMED = (
    "open('/proc/self/comm', 'wb').write(b'half a letter\\xc3')\n"
    "print(flush=True)\n"
    "import time; time.sleep(60)\n"
)


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_names_of_other_processes_need_not_be_text() -> None:
    other, own = start(NAMED), start("print(flush=True); import time; time.sleep(60)")
    try:
        began = time.monotonic()
        end_group(own, 0.1)
        assert time.monotonic() - began < 10
        assert not is_alive(own.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        for process in (other, own):
            assert process.stdout is not None
            process.stdout.close()
