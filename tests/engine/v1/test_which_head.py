"""A head is told from other drafters in one way, named by a directory or by a repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from support.engines import drafting
from support.paths import HEAD, TARGET
from vllm_specformer.cli.main import main
from vllm_specformer.engine.checks import is_specformer
from vllm_specformer.engine.speculative_config import drafts_with_head
from vllm_specformer.errors import SpeculativeConfigError
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.head_files import find_head
from vllm_specformer.pairing import HeadWeightError

REPOSITORY = "acme/python-head"
OTHERS = (
    "eagle3",
    "eagle",
    "draft_model",
    "medusa",
    "dspark",
    "mtp",
    "dflash",
    "ngram",
    "Specformer",
)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled head in a cache of the hub, where there is no network; its snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / ("models--" + REPOSITORY.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "snapshots" / commit
    for path in (snapshot, folder / "blobs", folder / "refs"):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for file in HEAD.iterdir():
        shutil.copy(file, folder / "blobs" / file.name)
        (snapshot / file.name).symlink_to(folder / "blobs" / file.name)
    return snapshot


def configured(speculative: dict[str, Any]) -> Any:
    arguments = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    config = EngineArgs(model=str(TARGET), speculative_config=speculative, **arguments)
    return config.create_engine_config().speculative_config


def without_method(model: Path | str) -> dict[str, Any]:
    return {"model": str(model), "num_speculative_tokens": 4}


def test_repository_without_a_method(repository: Path) -> None:
    config = configured(without_method(REPOSITORY))
    assert config.method == "dflash"
    assert drafts_with_head(config)


@pytest.mark.parametrize("method", OTHERS)
def test_another_method(repository: Path, method: str) -> None:
    for model in (str(HEAD), REPOSITORY):
        message = f"method={method!r} cannot draft with model={model!r}, a SpecFormer head; write"
        with pytest.raises(SpeculativeConfigError, match=re.escape(message)):
            configured(drafting(4, model, method=method))


def test_other_drafters_are_left_alone(repository: Path) -> None:
    assert not is_specformer({"method": "ngram", "num_speculative_tokens": 2})
    assert not is_specformer({"method": "custom_class", "model": "somewhere.Proposer"})
    assert not is_specformer({"method": "eagle3", "model": "acme/another"})
    assert not is_specformer({"model": str(TARGET)})


@pytest.mark.parametrize("field", ["speculators_model_type", "architectures"])
def test_a_head_that_lost_one_of_its_marks(tmp_path: Path, field: str) -> None:
    """Without its kind it is refused by name; its architecture the converter writes again."""
    head = Path(shutil.copytree(HEAD, tmp_path / "head"))
    content = json.loads((head / "config.json").read_text())
    del content[field]
    (head / "config.json").write_text(json.dumps(content))
    assert is_specformer(without_method(head))
    if field == "architectures":
        assert drafts_with_head(configured(without_method(head)))
        return
    with pytest.raises(HeadConfigError, match="field 'speculators_model_type' is None, expected"):
        configured(without_method(head))


def test_weights_in_the_cache_are_checked(repository: Path) -> None:
    weights = (repository / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(HeadWeightError, match="truncated or damaged"):
        configured(without_method(REPOSITORY))


def test_commands_take_a_repository(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`eval` and `bench` find the head in the same way, in `find_head`."""
    assert find_head(REPOSITORY) == repository
    assert main(["check", REPOSITORY, "--target", str(TARGET), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {f["status"] for f in found if f["subject"] in ("configuration", "weights")} == {"ok"}
    shares = ["--accepted", "0.8", "0.6", "--num-speculative-tokens", "2", "--chip", "h100"]
    assert main(["plan", REPOSITORY, "--target", str(TARGET), *shares]) == 0


def test_a_repository_that_is_not_there(repository: Path) -> None:
    with pytest.raises(HeadConfigError, match=r"head acme/none: neither a directory nor a model"):
        find_head("acme/none")
    with pytest.raises(HeadConfigError, match="head /no/such: no such directory; check the path"):
        find_head("/no/such")
