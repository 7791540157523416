"""Environment of the engine tests on vLLM's V1 runner; set before anything imports vLLM."""

from __future__ import annotations

from support.environment import prepare_engines

prepare_engines()
