"""A package that an extra would have brought is missed before any work is done."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest

from vllm_specformer.cli import extras
from vllm_specformer.cli.main import COMMANDS, main

ARGUMENTS = {
    "distill": ["--target", "t", "--prompts", "p", "--out", "o"],
    "train": ["--target", "t", "--data", "d", "--out", "o"],
    "eval": ["head", "--data", "d"],
    "bench": ["head", "--prompts", "p", "--out", "o"],
    "plan": ["head", "--prompts", "p", "--plot", "plan.png"],
}


@pytest.mark.parametrize("command", list(extras.NEEDS))
def test_what_is_missing_is_named(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert main([command, *ARGUMENTS[command]]) == 2
    extra, modules = extras.NEEDS[command]
    error = capsys.readouterr().err
    assert f"{', '.join(modules or ('matplotlib',))}: not installed" in error
    assert f"pip install '.[{extra}]' in a clone of vllm-specformer" in error
    assert list(tmp_path.iterdir()) == []


def test_plots_are_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --plot, `plan` runs without matplotlib and comes to what is wrong with its input."""
    hidden: list[str] = []

    def find(name: str) -> ModuleType | None:
        hidden.append(name)
        return None

    monkeypatch.setattr(extras, "find_spec", find)
    assert main(["plan", "no-such-head", "--prompts", "p"]) == 2
    assert hidden == []


def test_the_extras_bring_what_is_needed() -> None:
    assert set(extras.NEEDS) <= set(COMMANDS)
    named = requires("vllm-specformer") or []
    for extra, modules in extras.NEEDS.values():
        for module in {*modules, "matplotlib"}:
            assert any(
                line.startswith(module) and line.endswith(f'extra == "{extra}"') for line in named
            )
