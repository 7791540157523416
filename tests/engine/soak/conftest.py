"""The short soak runs in this process, on V1; the environment is that of V1's tests."""

from __future__ import annotations

from support.environment import prepare_engines

prepare_engines()
