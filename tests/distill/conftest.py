"""The bundled target with a chat template, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.distill.fakes import chat_target
from vllm_specformer.distill.encode import Encoder, load_encoder


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_target(tmp_path_factory.mktemp("targets") / "chat")


@pytest.fixture(scope="session")
def encoder(target: Path) -> Encoder:
    return load_encoder(target)
