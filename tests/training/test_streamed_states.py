"""States from vLLM are those of Transformers, on a disk of bounded size; a training is the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.family_targets import make_target
from support.paths import TARGET
from support.states_rows import same_states
from support.training_runs import command, refusal, train
from support.training_texts import make_texts, write_distilled
from vllm_specformer.cli.main import main
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.serving.engine_process import EngineProcessError
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training import streamed_states
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.packing import Batches, Budget, collate
from vllm_specformer.training.streamed_states import check_states, states_from_vllm
from vllm_specformer.training.texts import Texts
from vllm_specformer.training.trainer import HeadTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 128 << 20,
    "max_num_batched_tokens": 128,  # texts are computed in several steps
    "max_num_seqs": 8,
}
HOOKS = (0, 2, 5)
LAYERS, LONGEST, BATCH_TOKENS = 6, 200, 512
TOKEN_BYTES = 4 * 4 * 256  # four states in float32
LIMIT = 3 * BATCH_TOKENS * TOKEN_BYTES


@pytest.fixture(scope="module")
def texts() -> Texts:
    return make_texts(40, 2048, 6, LONGEST)


def head_config(**changes: Any) -> SpecFormerConfig:
    config = AutoConfig.from_pretrained(TARGET)
    return SpecFormerConfig.preset("default", config, "t", **changes)


def test_states_are_those_of_transformers(texts: Texts, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    target = HookedTarget(model, HOOKS)
    batches = Batches(
        texts,
        np.arange(30),
        Budget(BATCH_TOKENS),
        per_text=4,
        slot_counts=(4,),
        seed=0,
        per_step=1,
        steps=20,
        epochs=1,
    )
    place = tmp_path / "states"
    place.mkdir()
    (place / "of-a-killed-run.safetensors").touch()
    with states_from_vllm(
        TARGET,
        "t",
        head_config(aux_hidden_state_layer_ids=HOOKS),
        texts,
        dtype=torch.float32,
        device=torch.device("cpu"),
        directory=place,
        limit=LIMIT,
        engine_args=ENGINE,
        devices=None,
    ) as states:
        assert states.parameters == sum(p.numel() for p in model.parameters())
        states.begin(batches)
        for number in range(3, len(batches)):  # as a continued run
            batch = batches.batch(number)
            fields = collate(texts, batch, 4, np.random.default_rng(number))
            found = states.trained(number, batch, dict(fields))
            same_states(found, run_target(target, fields, True), texts, batch)
            written = sum(p.stat().st_size for p in place.glob("*.safetensors"))
            assert written <= LIMIT + 200 * len(texts)  # and what stands before the states
            if number == 5:
                held_out = [[30, 31], [32]]
                fields = collate(texts, held_out, None, None)
                found = states.held_out(held_out, dict(fields))
                same_states(found, run_target(target, fields, True), texts, held_out)
        assert [p.name for p in place.iterdir()] == ["vllm.log"]
        states._engine.kill()
        fields = collate(texts, held_out, None, None)
        with pytest.raises(EngineProcessError, match="vLLM's engine ended"):
            states.held_out(held_out, fields)
    assert not place.exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target that vLLM serves, in float32, and answers."""
    folder = tmp_path_factory.mktemp("tiny")
    make_target("qwen3").save_pretrained(folder / "target")
    write_distilled(folder / "data", make_texts(60, 300, 20, 80), folder / "target")
    return folder


SHORT: dict[str, Any] = {
    "max_steps": 20,
    "log_every": 1,
    "eval_every": 10,
    "save_every": 5,
    "batch_tokens": 256,
    "eval_texts": 4,
}
FROM_VLLM = {
    "states": "vllm",
    "states_disk": 0.001,
    "engine_args": json.dumps(ENGINE | {"skip_tokenizer_init": True}),
}


def losses(out: Path) -> list[float]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("eval_tokens_per_step")) for row in log]


def test_a_training_is_the_same_with_them(tiny: Path, tmp_path: Path) -> None:
    """Interrupted and continued, too."""
    train(tiny, tmp_path / "transformers", **SHORT)
    out = tmp_path / "vllm"
    with pytest.MonkeyPatch.context() as patch:
        save, left = HeadTrainer._save_checkpoint, [2]

        def killed(self: HeadTrainer, *args: Any) -> None:
            save(self, *args)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        patch.setattr(HeadTrainer, "_save_checkpoint", killed)
        assert main(command(tiny, out, **SHORT, **FROM_VLLM)) == 130
    assert (out / "checkpoints" / "checkpoint-10").is_dir()
    assert not (out / ".states").exists()
    provenance = train(tiny, out, **SHORT, **FROM_VLLM)
    assert provenance["settings"]["states"] == "vllm"
    assert losses(out) == pytest.approx(losses(tmp_path / "transformers"), rel=1e-3)
    found = load_file(out / "model.safetensors")
    for name, value in load_file(tmp_path / "transformers" / "model.safetensors").items():
        # Muon spreads rounding over a matrix.
        assert (found[name].float() - value.float()).norm() <= 0.05 * value.float().norm(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states_disk": 1}, "--states-disk: it is about vLLM's engine; add --states vllm"),
        ({"states": "vllm", "cache_states": 1}, "--cache-states 1.0: with --states vllm"),
        (
            {"states": "vllm", "engine_args": '{"enable_prefix_caching": true}'},
            "--engine-args: 'enable_prefix_caching' is set by the training; leave it out",
        ),
        (
            {"states": "vllm", "engine_args": '{"pipeline_parallel_size": 2}'},
            "'pipeline_parallel_size': the states of earlier stages .*; use 'tensor_parallel_size'",
        ),
        ({"states": "vllm", "engine_args": '{"no_such": 1}'}, "vLLM does not start: .*no_such"),
    ],
)
def test_what_makes_no_sense(
    changes: dict[str, Any],
    message: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = refusal(capsys, command(tiny, tmp_path / "out", **changes))
    assert re.search(message, found)


def test_several_processes() -> None:
    with pytest.raises(ValueError, match="one process trains, 2 were started; leave torchrun out"):
        check_states("vllm", head_config(), 2)
    with pytest.raises(ValueError, match="leave torchrun out and start the server on more GPUs"):
        check_states("http://there:8000", head_config(), 2)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_states, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed; install it, or take --states tra"):
        check_states("vllm", head_config(), 1)
