"""`specformer train`: train a head on what its target has written (see docs/training.md)."""

from __future__ import annotations

from vllm_specformer.cli.common import INTERRUPTED, say
from vllm_specformer.training.settings import TrainSettings

SETTINGS = TrainSettings


def run(settings: TrainSettings) -> int:
    """Train, or continue; exit code 0 when the head is there, 130 after Ctrl-C."""
    from vllm_specformer.training.train import train

    try:
        train(settings)
    except KeyboardInterrupt:
        say(
            f"\ninterrupted; give the same command again, and it continues from the last "
            f"checkpoint in {settings.out}"
        )
        return INTERRUPTED
    return 0
