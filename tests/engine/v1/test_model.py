"""What vLLM reads of a head, and may do to it while it is served: other weights, or sleep."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3Config
from vllm import LLM

from support.configs import SLOTS, asking, configured
from support.drafts import watching
from support.engines import Job, drafting, engine, greedy, prompts
from support.heads import make_head
from support.paths import HEAD, TARGET
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.compat.versions import installed_vllm
from vllm_specformer.engine.model import SpecFormerDraftModel
from vllm_specformer.head import SpecFormerHead
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


def test_vllm_reads_the_speculators_format(tmp_path: Path) -> None:
    """`vllm serve HEAD` resolves target, method and number of drafts from the head alone.

    Since 0.33 vLLM takes a target by its repository only, not from a directory that a head names.
    """
    from vllm.transformers_utils.config import maybe_override_with_speculators

    if not installed_vllm()[1].startswith("0.32."):
        with pytest.raises(ValueError, match="must name a remote model repository"):
            maybe_override_with_speculators(
                model=str(HEAD), tokenizer=None, trust_remote_code=False
            )
        return
    model, tokenizer, speculative = maybe_override_with_speculators(
        model=str(HEAD), tokenizer=None, trust_remote_code=False, vllm_speculative_config=None
    )
    verifier = json.loads((HEAD / "config.json").read_text())["speculators_config"]["verifier"]
    assert model == tokenizer == verifier["name_or_path"]
    assert speculative["num_speculative_tokens"] == SLOTS
    assert speculative["model"] == str(HEAD)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_vllm_reads_every_preset(tmp_path: Path, preset: str) -> None:
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    from vllm_specformer.engine.model import head_config

    target = AutoConfig.from_pretrained(TARGET)
    assert isinstance(target, Qwen3Config)
    markov = {"markov_rank": 3, "markov_gate": True}
    config = SpecFormerConfig.preset(preset, target, str(TARGET), num_draft_slots=5, **markov)
    SpecFormerHead(config).save_pretrained(tmp_path)
    read = SpeculatorsConfig.from_pretrained(tmp_path)
    assert read.architectures == ["SpecFormerDraftModel"]
    assert head_config(read).to_dict() == SpecFormerConfig.from_pretrained(tmp_path).to_dict()
    speculative = configured(asking(tmp_path, None)).speculative_config
    assert speculative.num_speculative_tokens == 5
