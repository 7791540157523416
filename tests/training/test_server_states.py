"""States from a server that runs already: those of Transformers, trained on, gone afterwards."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.paths import TARGET
from support.states_http import answering
from support.states_rows import same_states
from support.training_runs import command, refusal, train
from support.training_texts import make_texts, write_distilled
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.serving import states_server
from vllm_specformer.serving.server import serving
from vllm_specformer.serving.states_server import StatesServer, StatesServerError, serve_line
from vllm_specformer.state_files import LAYER_IDS
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.heldout import run_target
from vllm_specformer.training.packing import Batches, Budget, collate
from vllm_specformer.training.streamed_states import states_from_server

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST, BATCH_TOKENS = 120, 512
CONFIG = SpecFormerConfig.preset("default", AutoConfig.from_pretrained(TARGET), "t")
IDS = sorted({*CONFIG.aux_hidden_state_layer_ids, CONFIG.target_num_layers})
SMALL = ("--enforce-eager", "--kv-cache-memory-bytes=134217728", "--max-num-seqs=8")
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "target").symlink_to(TARGET)
    write_distilled(folder / "data", make_texts(60, 2048, 20, LONGEST), folder / "target")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes; it makes the directory."""
    return tmp_path_factory.mktemp("shared") / "states"


@pytest.fixture(scope="module")
def url(pair: Path, place: Path) -> Iterator[str]:
    """A server that was started by the very line that messages give."""
    line = serve_line(str(pair / "target"), IDS, "float32", LONGEST, place)
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    with serving([*words[2:], *SMALL], place.with_name("vllm.log"), timeout_s=900) as server:
        yield server.url


@pytest.mark.slow
def test_states_are_those_of_transformers(url: str, pair: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    target = HookedTarget(model, CONFIG.aux_hidden_state_layer_ids)
    texts = make_texts(60, 2048, 20, LONGEST)
    batches = Batches(
        texts,
        np.arange(50),
        Budget(BATCH_TOKENS),
        per_text=4,
        slot_counts=(4,),
        seed=0,
        per_step=1,
        steps=20,
        epochs=2,
    )
    size = BATCH_TOKENS * len(IDS) * CONFIG.hidden_size * 4
    with states_from_server(
        f"{url}/v1",
        pair / "target",
        "by another name",
        str(pair / "target"),
        CONFIG,
        texts,
        dtype=torch.float32,
        device=torch.device("cpu"),
        directory=place,
        limit=3 * size,
    ) as states:
        assert list(place.iterdir()) == []
        states.begin(batches)
        for number in (3, 4, 5):  # as a continued run
            batch = batches.batch(number)
            fields = collate(texts, batch, 4, np.random.default_rng(number))
            found = states.trained(number, batch, dict(fields))
            same_states(found, run_target(target, fields, True), texts, batch)
            written = sum(p.stat().st_size for p in place.iterdir())
            assert written <= 3 * size + 400 * len(texts)  # and what stands before the states
        held_out = [[50, 51], [52]]
        fields = collate(texts, held_out, None, None)
        found = states.held_out(held_out, dict(fields))
        same_states(found, run_target(target, fields, True), texts, held_out)
    # What was made ahead and never asked for is gone, too.
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_training(url: str, pair: Path, place: Path, tmp_path: Path) -> None:
    short = {"max_steps": 6, "batch_tokens": 512, "eval_texts": 4, "slots": None}
    train(pair, tmp_path / "transformers", **short)
    provenance = train(pair, tmp_path / "server", **short, states=url)
    assert provenance["settings"]["states"] == "server"
    logs = [_losses(tmp_path / name) for name in ("server", "transformers")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    assert list(place.iterdir()) == []
    # Its address is no part of what a run is: it may have moved when the run is continued.
    assert (
        json.loads((tmp_path / "server" / "run.json").read_text())["settings"]["states"] == "server"
    )


def _losses(out: Path) -> list[float]:
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("eval_tokens_per_step")) for row in log]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hooks": "0,1,2,4"},
            r"the server writes the hidden states [\d,]+, the head needs 0,1,2,4,6; start it with: "
            "vllm serve",
        ),
        ({"dtype": "bfloat16"}, "the server's states are F32, the training's BF16"),
        ({"served_model": "mine"}, r"serves '.*target', not 'mine'; if that is --target, name it"),
    ],
)
def test_a_server_for_another_training(
    changes: dict[str, Any],
    message: str,
    url: str,
    pair: Path,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert re.search(
        message, refusal(capsys, command(pair, tmp_path / "out", states=url, **changes))
    )
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": "localhost"}, "--states: expected 'transformers', 'vllm' or the URL of a serv"),
        ({"states": NOBODY, "cache_states": 1}, f"--cache-states 1.0: with --states {NOBODY}"),
        (
            {"states": NOBODY, "engine_args": '{"tensor_parallel_size": 2}'},
            "--engine-args: the server of --states is running already; leave it out, and start",
        ),
        ({"states": "vllm", "served_model": "x"}, "--served-model x: it is about a server; give"),
        (
            {"states": NOBODY},
            rf"--states {NOBODY}: no answer \(.*refused\); start it with: vllm serve \S*target "
            r"--dtype float32 --max-model-len \d+ --no-enable-prefix-caching --speculative-c.*"
            rf"extract_hidden_states.*{re.escape(str(IDS))}.* --kv-transfer-config .*out-states",
        ),
    ],
)
def test_what_makes_no_sense(
    changes: dict[str, Any],
    message: str,
    pair: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = refusal(capsys, command(pair, tmp_path / "out", **changes))
    assert re.search(message, found), found


def connected(url: str) -> Path:
    server = StatesServer(
        url, "t", ["t"], [0, 2], dtype="float32", max_model_len=9, directory=Path("/shared")
    )
    return server.connect([1, 2, 3], 8)


def test_what_a_server_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_server, "FILE_TIMEOUT_S", 0.1)
    file = tmp_path / "text.safetensors"
    with answering("t", 9, str(file)) as url:
        with pytest.raises(StatesServerError, match=f"names {file}, which is not on this machine;"):
            connected(url)
        for about, size, message in (
            (None, 8, "does not say which hidden states it holds"),
            ({LAYER_IDS: "0,3"}, 8, "writes the hidden states 0,3, the head needs 0,2"),
            ({LAYER_IDS: "0,2"}, 16, "the server's hidden_size is 16, that of --target 8"),
        ):
            save_file({"hidden_states": torch.zeros(3, 2, size)}, file, about)
            with pytest.raises(StatesServerError, match=message):
                connected(url)
            assert not file.exists()
        save_file({"hidden_states": torch.zeros(3, 2, 8)}, file, {LAYER_IDS: "0,2"})
        assert connected(url) == tmp_path
    for model, longest, message in (
        ("other", 9, "the server serves 'other', not 't'; if that is --target, name it"),
        ("t", 8, r"max_model_len is 8, the longest text needs 9 \(--max-length\)"),
        ("t", 9, r"the server writes no hidden states; start it with: vllm"),
    ):
        with (
            answering(model, longest, None) as url,
            pytest.raises(StatesServerError, match=f"{url}: .*{message}"),
        ):
            connected(url)
