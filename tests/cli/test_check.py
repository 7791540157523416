"""`specformer check`: what fits is confirmed, every kind of misfit is named with its remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.paths import HEAD, TARGET
from vllm_specformer import __version__
from vllm_specformer.cli.main import main
from vllm_specformer.errors import SpecFormerError, SpeculativeConfigError
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.pairing import HeadWeightError
from vllm_specformer.target.files import target_record

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A copy of the bundled head with a provenance that fits."""
    path = Path(shutil.copytree(HEAD, tmp_path / "head"))
    record = {
        "target": target_record(str(TARGET), TARGET, None).model_dump(),
        "data": {},
        "settings": {},
        "versions": {"vllm-specformer": __version__},
        "result": {},
    }
    (path / "provenance.json").write_text(json.dumps(record))
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TARGET, tmp_path / "target"))


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def check(
    capsys: pytest.CaptureFixture[str], head: Path, target: Path = TARGET, *more: str
) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the findings by subject."""
    capsys.readouterr()
    code = main(["check", str(head), "--target", str(target), "--json", *more])
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] == (code == 0)
    for finding in printed["findings"]:
        assert bool(finding["remedy"]) == (finding["status"] != "ok"), finding
    return code, {finding["subject"]: finding for finding in printed["findings"]}


def misfit(found: tuple[int, dict[str, dict[str, str]]], subject: str) -> str:
    """The only misfit, in words."""
    code, findings = found
    assert code == 1
    assert [name for name, f in findings.items() if f["status"] == "misfit"] == [subject]
    return f"{findings[subject]['found']} | {findings[subject]['remedy']}"


def test_a_pair_that_fits(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, findings = check(capsys, head)
    assert code == 0
    assert {f["status"] for name, f in findings.items() if name != "dtype"} == {"ok"}
    assert list(findings) == [
        *("configuration", "weights", "slots", "vLLM", "vLLM class", "shapes", "hooks"),
        *("context", "dtype", "tokenizer", "fingerprint"),
    ]
    assert main(["check", str(head), "--target", str(TARGET)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "the head fits"
    assert "Qwen3ForCausalLM hands out" in printed


def test_neither_vllm_nor_a_device_is_touched(head: Path) -> None:
    """In a process of its own: vLLM is not imported, no tensor reaches a GPU."""
    code = (
        "import sys\n"
        "from vllm_specformer.cli.main import main\n"
        f"code = main(['check', {str(head)!r}, '--target', {str(TARGET)!r}])\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'vllm']\n"
        "sys.exit(code)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


def test_no_provenance_is_a_warning(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (head / "provenance.json").unlink()
    code, findings = check(capsys, head)
    assert code == 0
    assert findings["provenance"]["status"] == "warning"
    assert "specformer eval HEAD --serve" in findings["provenance"]["remedy"]


def test_another_release_is_a_warning(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def older(content: dict[str, Any]) -> None:
        content["versions"]["vllm-specformer"] = "0.0.1"

    edit_json(head / "provenance.json", older)
    code, findings = check(capsys, head)
    assert code == 0
    assert "trained with vllm-specformer 0.0.1" in findings["release"]["found"]


def test_other_weights_of_the_same_shape(
    head: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(target / "model.safetensors")
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in misfit(check(capsys, head, target), "fingerprint")


def test_another_shape(head: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(target / "config.json", lambda content: content.update(hidden_size=512))
    (head / "provenance.json").unlink()
    said = misfit(check(capsys, head, target), "shapes")
    assert "hidden_size is 512, the head's is 256 | use the head of this target" in said


def test_a_longer_context_is_a_warning(
    head: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(target / "config.json", lambda c: c.update(max_position_embeddings=4096))
    (head / "provenance.json").unlink()
    code, findings = check(capsys, head, target)
    assert code == 0
    assert "--max-model-len 1024" in findings["context"]["remedy"]


def test_damaged_weights(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = head / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert "'fc.weight' holds NaN" in misfit(check(capsys, head), "weights")
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated or damaged" in misfit(check(capsys, head), "weights")


def test_a_configuration_that_cannot_be_used(
    head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(head / "config.json", lambda c: c.update(aux_hidden_state_layer_ids=[0, 3, 5, 9]))
    said = misfit(check(capsys, head), "configuration")
    assert "must lie in 0..6" in said


def test_a_class_that_hands_out_no_states(
    head: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 in vLLM lacks SupportsEagle3."""

    def other(content: dict[str, Any]) -> None:
        content["target_architecture"] = "GPT2LMHeadModel"
        content["speculators_config"]["verifier"]["architectures"] = ["GPT2LMHeadModel"]

    edit_json(head / "config.json", other)
    edit_json(target / "config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"]))
    (head / "provenance.json").unlink()
    said = misfit(check(capsys, head, target), "vLLM class")
    assert "lacks SupportsEagle3" in said


def test_more_tokens_than_slots(head: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(capsys, head, TARGET, "--num-speculative-tokens", "9")
    assert "num_speculative_tokens=9 must be a whole number from 1 to 8" in misfit(found, "slots")


def test_no_target(head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such directory" in misfit(check(capsys, head, tmp_path / "none"), "target")


@pytest.mark.parametrize("kind", [HeadConfigError, HeadWeightError, SpeculativeConfigError])
def test_errors_about_heads_are_the_users(kind: type[Exception]) -> None:
    """The commands print them without a traceback; callers may go on catching ValueError."""
    assert issubclass(kind, SpecFormerError)
    assert issubclass(kind, ValueError)
