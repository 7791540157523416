"""vLLM's complete configuration for a speculative config, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from support.paths import HEAD, TARGET

SLOTS = json.loads((HEAD / "config.json").read_text())["num_draft_slots"]


def configured(speculative: dict[str, Any], target: Path = TARGET, **changes: Any) -> VllmConfig:
    """vLLM's complete configuration, as an engine would make it."""
    arguments = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True} | changes
    return EngineArgs(
        model=str(target), speculative_config=speculative, **arguments
    ).create_engine_config()


def asking(head: Path | str, tokens: Any = 2, **more: Any) -> dict[str, Any]:
    return {"method": "specformer", "model": str(head), "num_speculative_tokens": tokens, **more}
