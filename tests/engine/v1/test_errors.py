"""What cannot work is refused before any weights are loaded, by field, value and remedy.

No engine starts here: vLLM's own configuration code runs, up to where workers would be started.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, Qwen3Config
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from support.paths import HEAD, TARGET
from vllm_specformer.config import HeadConfigError, SpecFormerConfig
from vllm_specformer.engine.checks import check_target_class, check_v1_verification
from vllm_specformer.engine.compat.versions import (
    ALLOW_UNTESTED,
    IncompatibleVLLMError,
    installed_vllm,
)
from vllm_specformer.engine.speculative_config import SCHEDULE, confidence_ranges
from vllm_specformer.errors import SpeculativeConfigError
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.pairing import HeadWeightError
from vllm_specformer.plugin import register

SLOTS = json.loads((HEAD / "config.json").read_text())["num_draft_slots"]

Edit = Callable[[dict[str, Any]], None]


def configured(speculative: dict[str, Any], target: Path = TARGET, **changes: Any) -> VllmConfig:
    """vLLM's complete configuration, as an engine would make it."""
    arguments = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True} | changes
    return EngineArgs(
        model=str(target), speculative_config=speculative, **arguments
    ).create_engine_config()


def asking(head: Path | str, tokens: Any = 2, **more: Any) -> dict[str, Any]:
    return {"method": "specformer", "model": str(head), "num_speculative_tokens": tokens, **more}


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A copy of the head, to be damaged."""
    return Path(shutil.copytree(HEAD, tmp_path / "head"))


def edit_config(head: Path, edit: Edit) -> None:
    path = head / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(head: Path, edit: Edit) -> None:
    path = head / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def small_target(directory: Path, **changes: Any) -> Path:
    """The configuration of another target; its weights are never looked at."""
    shutil.copytree(TARGET, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_arguments_may_be_asked_twice() -> None:
    """Programs look at the configuration before they start an engine with the same arguments."""
    speculative = asking(HEAD, draft_confidence_threshold=0.3)
    arguments = EngineArgs(model=str(TARGET), speculative_config=speculative, max_model_len=128)
    once, again = (arguments.create_engine_config().speculative_config for _ in range(2))
    assert confidence_ranges(once)
    assert confidence_ranges(again) == confidence_ranges(once)
    assert speculative == asking(HEAD, draft_confidence_threshold=0.3)


# --- what is right passes ---


def test_a_good_pair_is_accepted() -> None:
    config = configured(asking(HEAD, 4)).speculative_config
    assert config.num_speculative_tokens == 4
    assert config.method == "dflash"
    assert config.draft_model_config.hf_config.architectures == ["SpecFormerDraftModel"]


def test_method_may_be_left_out() -> None:
    config = configured({"model": str(HEAD)}).speculative_config
    assert config.method == "dflash"
    assert config.num_speculative_tokens == SLOTS


# --- number of drafts ---


@pytest.mark.parametrize("tokens", [0, -1, SLOTS + 1, 2.5, "3", True])
def test_number_of_drafts(tokens: Any) -> None:
    given = re.escape(repr(tokens))
    message = rf"num_speculative_tokens={given} must be a whole number from 1 to {SLOTS}"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, tokens))


# --- which head ---


def test_no_head_named() -> None:
    with pytest.raises(SpeculativeConfigError, match="field 'model' is missing; set it to the"):
        configured({"method": "specformer", "num_speculative_tokens": 2})


def test_head_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without this it asks the network, several times and with pauses where there is none.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "'model' is 'no/such-head', which is neither a directory nor a repository"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking("no/such-head"))


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SpeculativeConfigError, match=r"'model' is '.*gone', which is neither"):
        configured(asking(tmp_path / "gone"))


def test_path_too_long_for_a_file_system() -> None:
    with pytest.raises(SpeculativeConfigError, match=r"'model' is 'xx.*xx', which is neither"):
        configured(asking("x" * 5000))


def test_target_given_as_head() -> None:
    message = "'speculators_model_type' is None, expected 'specformer'.*must name a SpecFormer head"
    with pytest.raises(HeadConfigError, match=message):
        configured(asking(TARGET))


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(HeadConfigError, match=r"config\.json is missing; 'model' must name"):
        configured(asking(tmp_path))


# --- fields that vLLM judges too late ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization": "fp8"}, "quantization='fp8' has no meaning for a SpecFormer head .*; le"),
        ({"use_local_argmax_reduction": True}, "use_local_argmax_reduction=True has no meaning"),
        ({"disable_padded_drafter_batch": True}, "disable_padded_drafter_batch=True has no mean"),
        ({"enable_adaptive_verification": True}, "enable_adaptive_verification=True has no mean"),
        ({SCHEDULE: []}, r"per_batch_size=\[\]: it is no list of ranges; write ranges"),
        ({SCHEDULE: [[1, 4]]}, r"\[1, 4\] is not \[first, last, tokens\]"),
        ({SCHEDULE: [[1, 4, 2.5]]}, "has 2.5 for its tokens"),
        ({SCHEDULE: [[2, 4, 1]]}, "the first range must start at 1"),
        ({SCHEDULE: [[1, 4, 4], [4, 8, 2]]}, "two ranges hold the batch size 4"),
        ({SCHEDULE: [[4, 1, 4]]}, "must have whole numbers 1 <= first <= last"),
        ({SCHEDULE: [[1, 4, -1]]}, "has -1 for its tokens"),
    ],
)
def test_fields_vllm_judges_after_loading(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD, **more))


# --- head configuration ---


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(temperature=1), "'temperature' with value 1 is unknown; remove it"),
        (lambda c: c.pop("slot_mask"), "'slot_mask' is missing; add it or train"),
        (lambda c: c.pop("transformer_layer_config"), "'transformer_layer_config' is missing"),
        (
            lambda c: c.update(aux_hidden_state_layer_ids=[0, 3, 5, 7]),
            r"aux_hidden_state_layer_ids=\[0, 3, 5, 7\] must lie in 0\.\.6",
        ),
        (
            lambda c: c.update(aux_hidden_state_layer_ids=[3, 0, 5, 6]),
            r"aux_hidden_state_layer_ids=\[3, 0, 5, 6\] must be strictly increasing",
        ),
        (lambda c: c.update(num_draft_slots=99), "'num_draft_slots' with value 99.*64"),
    ],
    ids=["unknown", "missing", "no-layer", "hook-out-of-range", "hooks-unsorted", "many-slots"],
)
def test_bad_head_config(head: Path, edit: Edit, message: str) -> None:
    edit_config(head, edit)
    with pytest.raises(HeadConfigError, match=message) as error:
        configured(asking(head))
    assert str(head / "config.json") in str(error.value)


# --- head and target ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 128}, "hidden_size is 128, the head's is 256"),
        ({"vocab_size": 4096}, "vocab_size is 4096, the head's is 2048"),
        (
            {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8},
            "num_hidden_layers is 8, the head's is 6",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "architecture is LlamaForCausalLM, the head's is Qwen3ForCausalLM",
        ),
    ],
    ids=["hidden-size", "vocabulary", "layers", "architecture"],
)
def test_head_of_another_target(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    target = small_target(tmp_path / "other", **changes)
    with pytest.raises(
        HeadConfigError, match=rf"{message}.*; use the head of this target"
    ) as error:
        configured(asking(HEAD), target)
    assert str(target) in str(error.value)


def test_shallow_target(tmp_path: Path) -> None:
    target = small_target(
        tmp_path / "shallow", num_hidden_layers=3, layer_types=["full_attention"] * 3
    )
    message = "num_hidden_layers=3, SpecFormer needs at least 4.*serve it without speculation"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD), target)


@pytest.mark.parametrize(
    "field",
    ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"],
)
def test_spread_over_devices(field: str) -> None:
    message = f"{field}=2: SpecFormer does not support it .*; use tensor parallelism, or serve"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(
            asking(HEAD), distributed_executor_backend="mp", tensor_parallel_size=2, **{field: 2}
        )


def test_engine_that_generates_nothing() -> None:
    with pytest.raises(SpeculativeConfigError, match=r"runner='pooling': .* leave the speculative"):
        configured(asking(HEAD), runner="pooling")


# --- weights ---


def test_missing_weights(head: Path) -> None:
    (head / "model.safetensors").unlink()
    with pytest.raises(HeadWeightError, match=r"model\.safetensors: the file is missing; copy or"):
        configured(asking(head))


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_truncated_weights(head: Path, keep: float) -> None:
    path = head / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(HeadWeightError, match=r"the file is truncated or damaged.*copy or train"):
        configured(asking(head))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(head: Path, value: float) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["slot_attn.qkv_proj.weight"][3, 4] = value

    edit_weights(head, spoil)
    message = r"tensor 'slot_attn\.qkv_proj\.weight' holds NaN or infinite.*resume the training"
    with pytest.raises(HeadWeightError, match=message):
        configured(asking(head))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("fc.weight"), r"'fc\.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra' is unknown"),
        (
            lambda t: t.update({"fc.weight": torch.zeros(2, 3)}),
            r"'fc\.weight' has shape \[2, 3\], expected \[256, 1792\]",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_weights_of_another_config(head: Path, edit: Edit, message: str) -> None:
    edit_weights(head, edit)
    with pytest.raises(HeadWeightError, match=rf"{message}.*must come from the same training"):
        configured(asking(head))


# --- vLLM and the target's class ---


def test_unsupported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr("vllm.version.__version__", "0.11.2")
    message = r"does not support vLLM 0\.11\.2; tested are 0\.32\.x.*pip install"
    with pytest.raises(IncompatibleVLLMError, match=message):
        register()


def test_class_without_hidden_states(tmp_path: Path) -> None:
    shutil.copytree(
        TARGET, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    GPT2Config(
        n_layer=6, n_embd=32, n_head=4, vocab_size=2048, n_positions=128,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(tmp_path / "gpt2")  # fmt: skip
    config = ModelConfig(model=str(tmp_path / "gpt2"), dtype="float32", max_model_len=64)
    message = "GPT2LMHeadModel cannot return auxiliary hidden states.*serve this model without"
    with pytest.raises(SpeculativeConfigError, match=message):
        check_target_class(config)


def test_transformers_code_has_no_state_zero() -> None:
    message = r"runs it by its Transformers code and hands out no hidden state 0.*--hooks"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD), model_impl="transformers")


def test_positions_in_several_dimensions(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    target = small_target(tmp_path / "mrope", rope_parameters=rope)
    with pytest.raises(SpeculativeConfigError, match=r"M-RoPE.*serve it without speculation"):
        configured(asking(HEAD), target)


def test_class_with_hidden_states() -> None:
    check_target_class(ModelConfig(model=str(TARGET), dtype="float32", max_model_len=64))


def test_class_is_judged_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proposer is built before the target's weights are read, so its check comes in time."""
    from vllm_specformer.engine import proposer_v1

    config = SimpleNamespace(model_config="the target's")
    monkeypatch.setattr(
        proposer_v1, "check_target_class", lambda c: (_ for _ in ()).throw(LookupError(c))
    )
    with pytest.raises(LookupError, match="the target's"):
        proposer_v1.SpecFormerProposer.__init__(
            object.__new__(proposer_v1.SpecFormerProposer), config, torch.device("cpu")
        )


# --- reading the head as vLLM does ---


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
    config = SpecFormerConfig.preset(preset, target, str(TARGET), markov_rank=3, num_draft_slots=5)
    SpecFormerHead(config).save_pretrained(tmp_path)
    read = SpeculatorsConfig.from_pretrained(tmp_path)
    assert read.architectures == ["SpecFormerDraftModel"]
    assert head_config(read).to_dict() == SpecFormerConfig.from_pretrained(tmp_path).to_dict()
    speculative = configured(asking(tmp_path, None)).speculative_config
    assert speculative.num_speculative_tokens == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"verification": "exact"}, "verification='exact' must be one of 'vllm', 'coupled'"),
        (
            {"rejection_sample_method": "block"},
            "rejection_sample_method='block' does not keep the target's distribution",
        ),
        (
            {
                "verification": "coupled",
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_rate": 0.5,
            },
            "rejection_sample_method='synthetic' is a rule of vLLM's own verification",
        ),
    ],
)
def test_refuses_verification(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpeculativeConfigError, match=re.escape(message)):
        configured(asking(HEAD, **more))


def test_coupled_verification_is_for_the_v2_runner() -> None:
    """Accepted by the configuration, which does not know the runner; refused by V1's proposer."""
    config = configured(asking(HEAD, verification="coupled"))
    with pytest.raises(SpeculativeConfigError, match="needs vLLM's V2 model runner"):
        check_v1_verification(config.speculative_config)
    check_v1_verification(configured(asking(HEAD, verification="vllm")).speculative_config)
    check_v1_verification(configured(asking(HEAD)).speculative_config)
