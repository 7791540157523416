"""`specformer train`: train a head on what its target has written (see docs/training.md)."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from vllm_specformer.cli.common import INTERRUPTED, say
from vllm_specformer.training.settings import TrainSettings

SETTINGS = TrainSettings


def run(settings: TrainSettings) -> int:
    """Train, continue or finish; exit code 0 when the head is there, 130 after Ctrl-C, SIGTERM."""
    if settings.finish is not None:
        from vllm_specformer.training.result import finish

        out = finish(settings.finish, Path(settings.out or settings.finish))
        print(f"{out} holds the head; README.md says how it did and how to serve it")
        return 0
    from vllm_specformer.training.run_directory import RunDirectory
    from vllm_specformer.training.train import train

    asked = threading.Event()

    def stop(*_: Any) -> None:
        """The first time the step under way is finished and saved, where it is one process's."""
        if asked.is_set() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise KeyboardInterrupt
        asked.set()
        say("\nending with a checkpoint after the step under way; once more ends at once")

    # Batch systems send SIGTERM before SIGKILL.
    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        signals = ()  # whoever runs it there takes them
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        train(settings, stop=asked.is_set)
    except KeyboardInterrupt:
        directory = RunDirectory(Path(settings.out))
        then = "it begins anew"
        if directory.last_checkpoint() is not None:
            command = f"specformer train --finish {settings.out}"
            then = f"it continues from there; or make a head of what there is: {command}"
        say(f"\ninterrupted. {directory.what_is_safe()} Give the same command again, and {then}")
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
