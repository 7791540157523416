"""The matrix runs on V1's engines; the environment must be theirs before vLLM is imported."""

from __future__ import annotations

import v1.conftest  # noqa: F401
