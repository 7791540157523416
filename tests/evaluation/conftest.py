"""The bundled pair, loaded once, and short answers of its target."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from support.answered_pair import Pair, load_pair

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="package")
def pair() -> Iterator[Pair]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get into each other's way in so small a model
    yield load_pair()
    torch.set_num_threads(threads)
