"""Real servers: an engine that is killed, a home that cannot be written, two engines at a time."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from support.engines import Job, drafting, greedy, prompts, run_plain
from support.outputs import Tokens, token_ids
from support.paths import TARGET
from vllm_specformer.serving.counts import read_draft_counts
from vllm_specformer.serving.server import Server, serving

pytestmark = pytest.mark.matrix

TEXTS, TOKENS = prompts()[:4], 24
OPTIONS = (
    str(TARGET), f"--speculative-config={json.dumps(drafting(4))}", "--dtype=float32",
    "--enforce-eager", "--max-model-len=512", "--kv-cache-memory-bytes=268435456",
)  # fmt: skip
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def engine_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine in a process of its own, as users have it; temporary files where we see them."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture(scope="module")
def expected() -> list[Tokens]:
    job = Job(TEXTS, greedy(TOKENS))
    return [ids for (ids,) in token_ids(run_plain({"texts": job}, max_model_len=512)["texts"])]


def complete(server: Server, prompt: str, max_tokens: int, **settings: object) -> Tokens:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body | {"model": str(TARGET)} | settings).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return tuple(json.load(answer)["choices"][0]["token_ids"])


def answers(server: Server) -> list[Tokens]:
    return [complete(server, text, TOKENS) for text in TEXTS]


def test_engine_killed(expected: list[Tokens], tmp_path: Path) -> None:
    """Who waits is told, nothing is left behind, and a new start answers the same."""
    ends: list[object] = []

    def wait(server: Server) -> None:
        try:
            # Eight sampled answers: seconds of work, so that it cannot be over before the kill.
            ends.append(complete(server, TEXTS[0], 450, ignore_eos=True, temperature=1, n=8))
        except (urllib.error.URLError, ConnectionError) as error:
            ends.append(error)

    with serving(OPTIONS, tmp_path / "server.log") as server:
        assert answers(server) == expected
        family = psutil.Process(server.process.pid).children(recursive=True)
        (core,) = [process for process in family if "EngineCor" in process.name()]
        waiting = threading.Thread(target=wait, args=(server,))
        before, deadline = read_draft_counts(server.url).drafts, time.monotonic() + PATIENCE_S
        waiting.start()
        while read_draft_counts(server.url).drafts == before:  # until it is being answered
            assert time.monotonic() < deadline
            time.sleep(0.02)
        core.kill()
        waiting.join(PATIENCE_S)
        assert isinstance(ends[0], urllib.error.HTTPError), ends
        assert ends[0].code == 500
        assert server.process.wait(PATIENCE_S) is not None
        _, alive = psutil.wait_procs(family, PATIENCE_S)
        assert alive == []
    assert list(tmp_path.glob("specformer-*")) == []
    with serving(OPTIONS, tmp_path / "again.log") as server:
        assert answers(server) == expected


def test_home_that_cannot_be_written(
    expected: list[Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM and the plugin make do with the temporary directory; nobody can write below /proc."""
    monkeypatch.setenv("HOME", "/proc/nobody")
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "VLLM_CACHE_ROOT", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    with serving(OPTIONS, tmp_path / "server.log") as server:
        assert answers(server) == expected
        assert read_draft_counts(server.url).accepted > 0


def test_two_engines_of_which_one_drafts(expected: list[Tokens], tmp_path: Path) -> None:
    """Data parallelism: one request at a time, so one engine is idle while the other drafts."""
    with serving((*OPTIONS, "--data-parallel-size=2"), tmp_path / "server.log") as server:
        assert answers(server) == expected
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as page:
            lines = page.read().decode().splitlines()
    steps = [line for line in lines if line.startswith("specformer:draft_steps_total{")]
    assert len(steps) == 2
    assert all(float(line.split()[-1]) > 0 for line in steps)
