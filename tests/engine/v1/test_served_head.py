"""What vLLM may do to a head that is being served: give it other weights, or put it to sleep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from vllm import LLM

from support.drafts import watching
from support.engines import Job, drafting, engine, greedy, prompts
from support.heads import make_head
from vllm_specformer.engine.model import SpecFormerDraftModel
from vllm_specformer.pairing import HeadWeightError

JOB = Job(prompts()[:4], greedy(16))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_head(tmp_path_factory.mktemp("model") / "head", "default", draft_vocab_size=700)


@pytest.fixture(scope="module")
def llm(head: Path) -> Iterator[LLM]:
    with engine(drafting(4, head)) as llm:
        yield llm


@pytest.fixture
def model(llm: LLM) -> SpecFormerDraftModel:
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    model = runner.drafter.model
    assert isinstance(model, SpecFormerDraftModel)
    return model


def test_other_weights_are_refused(llm: LLM, model: SpecFormerDraftModel, head: Path) -> None:
    """They are cut and packed for serving, so nothing may be copied over them; serving goes on."""
    with watching() as before:
        JOB.run(llm)
    weights = load_file(head / "model.safetensors")
    with pytest.raises(HeadWeightError, match="cannot be given others"):
        model.load_weights(weights.items())
    with watching() as after:
        JOB.run(llm)
    assert before.drafted
    assert after.drafted == before.drafted


def test_sleep_would_keep_all_that_drafting_reads(model: SpecFormerDraftModel) -> None:
    """vLLM saves a draft's parameters and buffers by name; its CPU build has no sleep mode."""
    kept = {tensor.data_ptr() for _, tensor in (*model.named_parameters(), *model.named_buffers())}
    read = {
        "rotary": model.head.rotary(model.head.fc.weight.device),
        "draft vocabulary": model.head.draft_token_ids,
        "rows of the lm_head": model.copied_rows.weight,
    }
    assert {name for name, tensor in read.items() if tensor.data_ptr() not in kept} == set()
