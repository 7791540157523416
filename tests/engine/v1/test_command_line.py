"""Every way vLLM's command line has to write a speculative config, and heads served by name alone.

vLLM's own parser and configuration code run here, up to where an engine would start.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli.serve import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from support.engines import drafting
from support.paths import HEAD, TARGET
from vllm_specformer.cli.main import main
from vllm_specformer.config import read_head_config
from vllm_specformer.engine.compat.versions import installed_vllm
from vllm_specformer.engine.speculative_config import confidence_ranges, drafts_with_head
from vllm_specformer.head_fields import HeadConfigError
from vllm_specformer.places import named_target

K = 3
WRITTEN = json.dumps(drafting(K))
SPELLINGS = {
    "json": ("--speculative-config", WRITTEN),
    "underscore": ("--speculative_config", WRITTEN),
    "equals": (f"--speculative-config={WRITTEN}",),
    "short": ("-sc", WRITTEN),
    "dotted": (
        "--speculative-config.method", "specformer", "--speculative-config.model", str(HEAD),
        "--speculative-config.num-speculative-tokens=3",
    ),
    "short dotted": (
        "-sc.method", "specformer", "-sc.model", str(HEAD), "-sc.num_speculative_tokens", "3",
    ),
    "flags": ("--spec-method", "specformer", "--spec-model", str(HEAD), "--spec-tokens", "3"),
    "flags, underscore": ("--spec_method=specformer", "--spec_model", str(HEAD), "--spec_tokens=3"),
    "flags, no method": ("--spec-model", str(HEAD), "--spec-tokens", "3"),
    "flag and json": (
        "--spec-method", "specformer",
        "-sc", json.dumps({"model": str(HEAD), "num_speculative_tokens": K}),
    ),
}  # fmt: skip
FILES = {
    "map": f"speculative-config:\n  method: specformer\n  model: {HEAD}\n"
    f"  num_speculative_tokens: {K}\n",
    "text": f"speculative-config: '{WRITTEN}'\n",
    "flags": f"spec-method: specformer\nspec-model: {HEAD}\nspec-tokens: {K}\n",
}


def served(*arguments: str) -> VllmConfig:
    """What `vllm serve` would start."""
    base = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    options = parser.parse_args([*arguments, *base])
    options.model = options.model_tag or options.model
    return AsyncEngineArgs.from_cli_args(options).create_engine_config()


def check(config: Any, tokens: int = K) -> None:
    assert drafts_with_head(config)
    assert config.num_speculative_tokens == tokens
    assert config.model == str(HEAD)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    check(served(str(TARGET), *SPELLINGS[spelling]).speculative_config)


@pytest.mark.parametrize("kind", FILES)
def test_every_spelling_in_a_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {TARGET}\n{FILES[kind]}")
    check(served("--config", str(file)).speculative_config)


def test_fields_of_ours_beside_the_flags() -> None:
    flags = ("--spec-method", "specformer", "--spec-model", str(HEAD))
    config = served(str(TARGET), *flags, "-sc.draft_confidence_threshold", "0.3")
    assert confidence_ranges(config.speculative_config)


# --- vllm serve HEAD ---

serves_directories = pytest.mark.skipif(
    not installed_vllm()[1].startswith("0.32."),
    reason="since 0.33 vLLM refuses targets by their directory in `vllm serve HEAD`",
)


def rename_target(head: Path, name: str) -> None:
    path = head / "config.json"
    content = json.loads(path.read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = name
    path.write_text(json.dumps(content))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair that was moved, and a working directory that is none of its own."""
    for source in (TARGET, HEAD):
        shutil.copytree(source, tmp_path / "moved" / source.name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "moved"


@serves_directories
def test_a_head_alone(elsewhere: Path) -> None:
    config = served(str(HEAD))
    check(config.speculative_config, read_head_config(HEAD).num_draft_slots)
    assert config.model_config.model == config.model_config.tokenizer == str(TARGET)
    moved = served("../moved/python-specformer", "-sc.num_speculative_tokens", "2")
    assert moved.model_config.model == str(elsewhere / "python-target")
    assert moved.speculative_config.num_speculative_tokens == 2


@serves_directories
def test_a_head_behind_a_link(elsewhere: Path) -> None:
    """ "../" in the file leads on from where the head is, not from where the link is."""
    Path("link").symlink_to(elsewhere / "python-specformer")
    assert served("link").model_config.model == str(elsewhere / "python-target")


@serves_directories
def test_a_head_with_an_absolute_path(elsewhere: Path) -> None:
    rename_target(elsewhere / "python-specformer", str(TARGET))
    assert served(str(elsewhere / "python-specformer")).model_config.model == str(TARGET)


@pytest.mark.parametrize("name", ["runs/target", "some/runs/target", "../gone", "/no/such", "x y"])
def test_a_head_whose_target_is_not_found(elsewhere: Path, name: str) -> None:
    """Also where the working directory has one of that name: a file means the same anywhere."""
    head = elsewhere / "python-specformer"
    rename_target(head, name)
    if not name.startswith(("/", "..")):
        shutil.copytree(TARGET, name)
    message = (
        rf"config {head}/config\.json: field 'speculators_config\.verifier\.name_or_path' is "
        rf"'{name}', neither a directory \(seen from this file\) nor a repository.*; write the "
        r"target's absolute path there.*--target.*vllm serve TARGET"
    )
    if installed_vllm()[1].startswith("0.32."):
        with pytest.raises(HeadConfigError, match=message):
            served(str(head))
    with pytest.raises(HeadConfigError, match=message):
        named_target(head, read_head_config(head))


def test_commands_find_the_target_from_the_file_on(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval` and `bench` take their default from the same function."""
    head = "../moved/python-specformer"
    assert main(["check", head, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert "fingerprint" in {f["subject"] for f in found if f["status"] == "ok"}
    shares = ["--accepted", "0.8", "0.6", "--num-speculative-tokens", "2", "--chip", "h100"]
    assert main(["plan", head, *shares, "--json", "plan.json"]) == 0
    plan = json.loads(Path("plan.json").read_text())
    assert plan["about"]["head"] == str(elsewhere / "python-specformer")
    assert plan["about"]["target"] == str(elsewhere / "python-target")
    assert plan["speculative_config"]["model"] == str(elsewhere / "python-specformer")
    rename_target(elsewhere / "python-specformer", "runs/target")
    capsys.readouterr()
    assert main(["check", head, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    (misfit,) = (f for f in found if f["status"] == "misfit")
    assert "config.json: field 'speculators_config.verifier.name_or_path' is" in misfit["found"]
    assert misfit["remedy"].startswith("write the target's absolute path there")
