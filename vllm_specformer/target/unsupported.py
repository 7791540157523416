"""The error that says why there can be no head for a target."""

from __future__ import annotations

from vllm_specformer.errors import SpecFormerError


class UnsupportedTargetError(SpecFormerError):
    """A head cannot be trained for this target; the message says why."""
