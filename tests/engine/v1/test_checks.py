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
from transformers import DeepseekV2Config, GPT2Config
from vllm.config import ModelConfig

from support.configs import SLOTS, asking, configured
from support.paths import HEAD, TARGET
from vllm_specformer.engine.attention import DraftAttentionBackend
from vllm_specformer.engine.checks import (
    check_batch_invariance,
    check_target_class,
    check_v1_verification,
    is_specformer,
)
from vllm_specformer.errors import SpeculativeConfigError
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.pairing import HeadWeightError

Edit = Callable[[dict[str, Any]], None]


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
    gone = tmp_path / "with a name that is longer than what is shown of other values" / "gone"
    message = re.escape(f"'model' is '{gone}': there is no such directory; check the path")
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(gone))
    with pytest.raises(SpeculativeConfigError, match="'heads/for/this': there is no"):
        configured(asking("heads/for/this"))


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


def test_class_without_hidden_states(tmp_path: Path) -> None:
    shutil.copytree(
        TARGET, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    GPT2Config(
        n_layer=6, n_embd=32, n_head=4, vocab_size=2048, n_positions=128,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(tmp_path / "gpt2")  # fmt: skip
    message = "GPT2LMHeadModel cannot return auxiliary hidden states.*serve this model without"
    with pytest.raises(SpeculativeConfigError, match=message):
        check_target_class(serving(tmp_path / "gpt2", (0, 3, 5, 6)))


def test_transformers_code_has_no_state_zero() -> None:
    message = r"runs it by its Transformers code and hands out no hidden state 0.*--hooks"
    with pytest.raises(SpeculativeConfigError, match=message):
        configured(asking(HEAD), model_impl="transformers")


def serving(target: Path, hooks: tuple[int, ...]) -> Any:
    """What the check reads of a configuration with a head of a target of six layers."""
    head = {"aux_hidden_state_layer_ids": list(hooks), "target_num_layers": 6}
    draft = SimpleNamespace(hf_config=SimpleNamespace(specformer=head))
    return SimpleNamespace(
        model_config=ModelConfig(model=str(target), dtype="float32", max_model_len=64),
        speculative_config=SimpleNamespace(draft_model_config=draft),
    )


def test_class_with_hidden_states() -> None:
    check_target_class(serving(TARGET, (0, 3, 5, 6)))


def test_class_without_the_hooked_states(tmp_path: Path) -> None:
    """vLLM's DeepSeek V2 adds a residual to the embedding, which has none, and fails."""
    config = DeepseekV2Config(
        num_hidden_layers=6, hidden_size=32, num_attention_heads=2, vocab_size=256,
        architectures=["DeepseekV2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "deepseek")
    message = (
        r"hooked to states \[0, 3, 5, 6\], but target class DeepseekV2ForCausalLM hands out no "
        r"hidden state 0; train a head with --hooks 1,3,5,6, or serve this target without"
    )
    with pytest.raises(SpeculativeConfigError, match=message):
        check_target_class(serving(tmp_path / "deepseek", (0, 3, 5, 6)))
    check_target_class(serving(tmp_path / "deepseek", (1, 3, 5, 6)))


# --- the model runner ---


def test_coupled_verification_is_for_the_v2_runner() -> None:
    """Accepted by the configuration, which does not know the runner; refused by V1's proposer."""
    config = configured(asking(HEAD, verification="coupled"))
    with pytest.raises(SpeculativeConfigError, match="needs vLLM's V2 model runner"):
        check_v1_verification(config.speculative_config)
    check_v1_verification(configured(asking(HEAD, verification="vllm")).speculative_config)
    check_v1_verification(configured(asking(HEAD)).speculative_config)


def test_batch_invariance_needs_coupled_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = configured(asking(HEAD)).speculative_config
    check_batch_invariance(plain)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    message = r"VLLM_BATCH_INVARIANT=1: .*; set verification='coupled'"
    with pytest.raises(SpeculativeConfigError, match=message):
        check_batch_invariance(plain)
    check_batch_invariance(configured(asking(HEAD, verification="coupled")).speculative_config)
    assert DraftAttentionBackend.supports_batch_invariance()


# --- whose head it is ---


@pytest.mark.parametrize("content", ["null", "[]", "{", "[" * 100_000, '"x"'])
def test_file_that_is_no_head(tmp_path: Path, content: str) -> None:
    """Nobody can tell whose it was; it is left to vLLM, without an error of our own."""
    (tmp_path / "config.json").write_text(content)
    assert not is_specformer({"model": str(tmp_path)})
