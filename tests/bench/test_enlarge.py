"""An enlarged target says what the small one says, and its head sees what it saw."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.file_limits import file_limit
from support.paths import HEAD, ROOT, TARGET
from vllm_specformer.bench.enlarge import EnlargeError, HeavyPair, enlarge
from vllm_specformer.cli.main import main
from vllm_specformer.data.files import DiskFullError
from vllm_specformer.evaluation.fit import MISFIT, examine
from vllm_specformer.shapes import TargetShape
from vllm_specformer.target.hidden_states import HookedTarget

PROMPTS = ROOT / "examples" / "server" / "prompts.jsonl"
SIZE, LAYERS = 40_000_000, 9


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> HeavyPair:
    return enlarge(TARGET, HEAD, tmp_path_factory.mktemp("heavy"), SIZE, LAYERS)


def load(directory: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_greedy_tokens_are_the_small_targets(pair: HeavyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = PROMPTS.read_text().splitlines()[:2]
    prompts = [tokenizer(json.loads(line)["prompt"], return_tensors="pt") for line in lines]
    small, large = load(TARGET), load(pair.target)
    for prompt in prompts:
        said, repeated = (
            model.generate(**prompt, max_new_tokens=32, do_sample=False) for model in (small, large)
        )
        assert said.tolist() == repeated.tolist()


def test_the_head_sees_the_same_states(pair: HeavyPair) -> None:
    ids = torch.arange(5, 45)[None]
    hooks = json.loads((HEAD / "config.json").read_bytes())["aux_hidden_state_layer_ids"]
    with torch.no_grad():
        before, logits = HookedTarget(load(TARGET), hooks)(ids)
        after, same_logits = HookedTarget(load(pair.target), hooks)(ids)
    for old, new in zip(before, after, strict=True):
        # A longer sum may be added up in another order; nothing else may differ.
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same_logits, logits, rtol=1e-4, atol=1e-4)


def test_the_work_is_really_there(pair: HeavyPair) -> None:
    config = json.loads((pair.target / "config.json").read_bytes())
    assert TargetShape.from_config(config).parameters == pair.parameters
    assert pair.parameters == pytest.approx(SIZE, rel=0.01)
    model = load(pair.target)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == pair.parameters
    last = model.model.layers[LAYERS - 1]
    assert not last.self_attn.o_proj.weight.any()
    assert not last.mlp.down_proj.weight.any()
    for busy in (
        last.self_attn.q_proj,
        last.self_attn.v_proj,
        last.mlp.gate_proj,
        last.mlp.up_proj,
    ):
        assert busy.weight.std() > 0.01
    wide = model.model.layers[0].mlp
    assert wide.gate_proj.weight[768:].std() > 0.01
    assert not wide.down_proj.weight[:, 768:].any()


def test_the_pair_fits(pair: HeavyPair) -> None:
    findings = examine(pair.head, None, None, 4)
    assert [finding for finding in findings if finding.status == MISFIT] == []
    # The head's other half is another target: its own no longer fits.
    assert any(f.status == MISFIT for f in examine(HEAD, str(pair.target), None, 4))


def test_a_pair_is_made_once(pair: HeavyPair) -> None:
    weights = pair.target / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert enlarge(TARGET, HEAD, pair.target.parent, SIZE, LAYERS) == pair
    assert weights.stat().st_mtime_ns == made
    (pair.target.parent / "enlarged.json").write_text("{}")  # as of another recipe
    assert enlarge(TARGET, HEAD, pair.target.parent, SIZE, LAYERS) == pair
    assert weights.stat().st_mtime_ns > made


def test_a_limit_on_files(tmp_path: Path) -> None:
    weights = tmp_path / "target" / "model.safetensors"
    message = re.escape(f"{weights}: File too large; raise the limit on the size of files")
    with file_limit(1 << 20), pytest.raises(DiskFullError, match=message):
        enlarge(TARGET, HEAD, tmp_path, SIZE, LAYERS)
    assert not (tmp_path / "enlarged.json").exists()
    assert enlarge(TARGET, HEAD, tmp_path, SIZE, LAYERS).target == weights.parent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": 1_000_000}, r"--parameters 1000000: with 9 layers the target has \d+"),
        ({"layers": 6}, r"--layers 6: must be more than the 6"),
    ],
)
def test_impossible_sizes_are_refused(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    arguments = {"parameters": SIZE, "layers": LAYERS} | changes
    with pytest.raises(EnlargeError, match=message):
        enlarge(TARGET, HEAD, tmp_path, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised; enlarge the original"),
        ({"architectures": ["GraniteForCausalLM"]}, "architecture 'GraniteForCausalLM' cannot be"),
        ({"vocab_size": 4096}, "the head was trained for another target"),
    ],
)
def test_other_targets_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, head = tmp_path / "target", tmp_path / "head"
    for directory, source in ((target, TARGET), (head, HEAD)):
        shutil.copytree(source, directory)
    _change(target / "config.json", changes)
    if architecture := changes.get("architectures"):
        _change(head / "config.json", {"target_architecture": architecture[0]})
    assert main(["enlarge", str(target), str(head), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _change(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def test_the_command_reads_magnitudes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["enlarge", str(TARGET), str(HEAD), "--out", str(tmp_path), "--layers", "7"]
    assert main([*command, "--parameters", "0.02B"]) == 0
    assert "20,135,936 parameters" in capsys.readouterr().out
    assert main([*command, "--parameters", "many"]) == 2
    assert "expected a number above 0 such as 500M or 1.5B, found 'many'" in capsys.readouterr().err
