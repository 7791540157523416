"""What a command makes of its arguments, without running it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from vllm_specformer.cli.main import COMMANDS, main
from vllm_specformer.settings import CommandSettings

Typed = Callable[..., Any]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """`typed("train", "--slots", "4", ...)`: the settings that the command is run with."""

    def settings_of(command: str, *arguments: str) -> CommandSettings:
        seen: list[CommandSettings] = []
        module = import_module(COMMANDS[command][0])
        monkeypatch.setattr(module, "run", lambda settings: seen.append(settings) or 0)
        assert main([command, *arguments]) == 0
        (settings,) = seen
        return settings

    return settings_of


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("train", ...)`: the one line that the command ends with, without its name."""

    def message(command: str, *arguments: str) -> str:
        capsys.readouterr()
        assert main([command, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"specformer {command}: ")
        assert error.count("\n") == 1
        return error.removeprefix(f"specformer {command}: ").rstrip()

    return message
