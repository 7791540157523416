"""A mixture of experts over two ranks: the idle one keeps step, and the output is the same."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest

from support.engines import drafting, engine, greedy
from support.family_pairs import Pair, make_pair
from support.paths import ROOT
from vllm_specformer.serving.counts import read_draft_counts
from vllm_specformer.serving.server import Server, serving

pytestmark = pytest.mark.matrix

TOKENS = 32
PATIENCE_S = 120
# vLLM's CPU build lacks two collectives that experts need under data parallelism.
COLLECTIVES = "--worker-extension-cls=support.cpu_collectives.Collectives"


@pytest.fixture(autouse=True)
def engine_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines in processes of their own, which find the tests' helpers."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("experts"), "qwen3-moe")


@pytest.fixture(scope="module")
def expected(pair: Pair) -> list[list[int]]:
    """Of one engine on one rank, without speculation."""
    changes = {"model": str(pair.target), "skip_tokenizer_init": True, "max_model_len": 192}
    params = greedy(TOKENS, detokenize=False, ignore_eos=True)
    with engine(None, **changes) as llm:
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in pair.prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def complete(server: Server, pair: Pair, prompt: tuple[int, ...]) -> list[int]:
    body = {
        "model": str(pair.target),
        "prompt": list(prompt),
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return tokens


def test_two_ranks(pair: Pair, expected: list[list[int]], tmp_path: Path) -> None:
    """One request at a time, so that one engine is idle while the other drafts.

    The idle one runs dummy steps, because its experts are wanted; a head that waited for it, or
    that it waited for, would hang. With `--enable-expert-parallel` vLLM's CPU kernel for experts
    crashes where a token's expert is another rank's, without speculation, too
    (`csrc/cpu/cpu_fused_moe.cpp:242`).
    """
    options = [
        str(pair.target), f"--speculative-config={json.dumps(drafting(4, pair.head))}",
        "--dtype=float32", "--enforce-eager", "--max-model-len=192", "--skip-tokenizer-init",
        "--kv-cache-memory-bytes=67108864", "--api-server-count=1",
        "--data-parallel-size=2", COLLECTIVES,
    ]  # fmt: skip
    with serving(options, tmp_path / "server.log", timeout_s=1800) as server:
        assert [complete(server, pair, prompt) for prompt in pair.prompts] == expected
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=PATIENCE_S) as page:
            lines = page.read().decode().splitlines()
        assert read_draft_counts(server.url).accepted > 0
    steps = [line for line in lines if line.startswith("specformer:draft_steps_total{")]
    assert len(steps) == 2
    assert all(float(line.split()[-1]) > 0 for line in steps)
