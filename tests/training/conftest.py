"""A toy target with random weights, and a head for it, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from support.toy_target import make_toy_target
from support.training_texts import make_texts, write_distilled, write_toy_target
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.training import report


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For vLLM beside a training, whose curves are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(report, "plot", lambda history: b"")
        yield


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy `target` and distilled `data` of it."""
    folder = tmp_path_factory.mktemp("pair")
    write_toy_target(folder / "target")
    write_distilled(folder / "data", make_texts(60, 40), folder / "target")
    return folder


@pytest.fixture
def target_model() -> PreTrainedModel:
    return make_toy_target()


@pytest.fixture(params=[0, 4], ids=["no-markov", "markov"])
def head(request: pytest.FixtureRequest, target_model: PreTrainedModel) -> SpecFormerHead:
    torch.manual_seed(1)
    config = SpecFormerConfig.preset(
        "default", target_model.config, "t", num_draft_slots=3, markov_rank=request.param
    )
    head = SpecFormerHead(config).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head
