"""The matrix runs on V1's engines; the environment must be theirs before vLLM is imported."""

from __future__ import annotations

from support.environment import prepare_engines

prepare_engines()
