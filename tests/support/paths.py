"""The repository, the bundled pair, and prompts that are in no part of its training."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "models" / "python-target"
HEAD = ROOT / "examples" / "models" / "python-specformer"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"
