"""`specformer bench`: speculation under load, with real servers (see docs/benchmarking.md)."""

from __future__ import annotations

import signal
import sys

from vllm_specformer.bench.settings import BenchSettings
from vllm_specformer.cli.common import INTERRUPTED, say

SETTINGS = BenchSettings


def run(settings: BenchSettings) -> int:
    """Measure and report; exit code 0, 130 after Ctrl-C."""
    from vllm_specformer.bench.compare import compare
    from vllm_specformer.bench.report import report
    from vllm_specformer.data.files import DiskFullError, write_errors

    # Ending by SIGTERM has to pass through the blocks that end the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with write_errors():
            report(compare(settings, say=say), settings.out)
    except KeyboardInterrupt:
        say("\ninterrupted; what was measured is kept, and the same command continues")
        return INTERRUPTED
    except DiskFullError as error:
        raise DiskFullError(
            f"{error}. What was measured is kept, and the same command continues"
        ) from None
    return 0
