"""Ten thousand requests to a real server whose KV cache is too small for them: `make soak`.

Once with K = 4 at every step, once with all that changes the number of drafts from step to step.
REQUESTS and MINUTES bound each; what comes first ends it. Figures go to build/soak.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm
from vllm import SamplingParams

from support.engines import Job, drafting, run_plain
from support.outputs import Tokens, token_ids
from support.paths import ROOT, TARGET
from support.traffic import Ask, stock, traffic
from vllm_specformer.serving.server import Server, serving

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("REQUESTS", "10000"))
MINUTES = float(os.environ.get("MINUTES", "30"))
STOCK = min(400, REQUESTS)
CLIENTS = 48
OPTIONS = (
    "--dtype=float32", "--enforce-eager", "--max-model-len=384", "--max-num-seqs=16",
    "--max-num-batched-tokens=256", "--block-size=32", "--num-gpu-blocks-override=24",
    "--scheduling-policy=priority", "--kv-cache-memory-bytes=268435456",
)  # fmt: skip
# The batch is as large as the KV cache has room for, so it goes up and down through the ranges.
VARYING = {
    "num_speculative_tokens_per_batch_size": [[1, 6, 4], [7, 9, 2], [10, 16, 0]],
    "draft_confidence_threshold": [[1, 6, 0.1], [7, 16, 0.3]],
}
# Between a quarter of the way, when everything has been allocated once, and the end.
MAX_GROWTH_MB = 100
PATIENCE_S = 300
# Shorter than any server's: a request sent while that closes the connection would be lost, and
# retrying would hide other losses.
KEEP_ALIVE_S = 2


@dataclass
class Told:
    """What became of the requests."""

    finished: int = 0
    left: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    bar: Any = field(default_factory=lambda: tqdm(total=REQUESTS, unit="request"))


def expected_answers(known: Sequence[Any]) -> list[Tokens]:
    job = Job([g.prompt for g in known], [SamplingParams(**g.settings) for g in known])
    return [ids for (ids,) in token_ids(run_plain({"stock": job}, max_model_len=384)["stock"])]


async def client(
    api: AsyncOpenAI, asks: Any, expected: Sequence[Tokens], told: Told, server: Server
) -> None:
    """Takes one request after the other until there are none left."""
    for ask in asks:
        try:
            tokens, to_the_end = await asyncio.wait_for(request(api, ask), PATIENCE_S)
        except Exception as error:  # whatever a user would see
            told.failed.append(f"{ask}: {error!r}, caused by {error.__cause__!r}")
            continue
        finally:
            told.bar.update()
        told.finished += to_the_end
        told.left += not to_the_end
        if (told.finished + told.left) % 50 == 0:
            told.memory_mb.append(await asyncio.to_thread(resident_mb, server))
        if ask.known is not None:
            told.compared += 1
            answer = expected[ask.known]
            if tokens != (answer if to_the_end else answer[: len(tokens)]):
                told.wrong.append(f"{ask}: {tokens}, without speculation {answer}")


async def request(api: AsyncOpenAI, ask: Ask) -> tuple[Tokens, bool]:
    """The streamed tokens, and whether the client waited for the last."""
    body = {**ask.settings, "priority": ask.priority, "return_token_ids": True}
    tokens: list[int] = []
    stream = await api.completions.create(
        model=str(TARGET), prompt=ask.prompt, stream=True, extra_body=body
    )
    async with contextlib.aclosing(stream.response):
        async for chunk in stream:
            tokens += (chunk.choices[0].model_extra or {}).get("token_ids") or []
            if ask.leaves_after is not None and len(tokens) > ask.leaves_after:
                return tuple(tokens), chunk.choices[0].finish_reason is not None
    return tuple(tokens), True


async def drive(server: Server, asks: list[Ask], expected: Sequence[Tokens]) -> Told:
    told, ends = Told(), time.monotonic() + 60 * MINUTES
    queue = itertools.takewhile(lambda _: time.monotonic() < ends, asks)
    http = DefaultAsyncHttpxClient(limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S))
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http
    ) as api:
        clients = (client(api, queue, expected, told, server) for _ in range(CLIENTS))
        await asyncio.gather(*clients)
    told.bar.close()
    return told


def resident_mb(server: Server) -> float:
    """Memory of the server and all its processes."""
    pages = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            group = (process / "stat").read_text().rsplit(")", 1)[1].split()[2]
            if int(group) == server.process.pid:
                pages += int((process / "statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def counted(server: Server) -> dict[str, float]:
    """vLLM's counters and gauges, summed over their labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:").removesuffix("_total")
            totals[name] = totals.get(name, 0) + sample.value
    return totals


@pytest.mark.parametrize("changes", [{}, VARYING], ids=["steady", "varying"])
def test_soak(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    known = stock(STOCK)
    expected = expected_answers(known)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    speculative = json.dumps(drafting(4, **changes))
    options = [str(TARGET), f"--speculative-config={speculative}", *OPTIONS]
    asks = list(itertools.islice(traffic(0, known), REQUESTS))
    with serving(options, tmp_path / "server.log") as server:
        started = time.monotonic()
        told = asyncio.run(drive(server, asks, expected))
        seconds = time.monotonic() - started
        idle(server)
        after = counted(server)
        assert server.process.poll() is None
    done = told.finished + told.left
    quarter = told.memory_mb[: max(1, len(told.memory_mb) // 4)]
    growth = max(told.memory_mb[-3:]) - max(quarter)
    figures = {
        "requests": done,
        "seconds": round(seconds),
        "left_early": told.left,
        "compared_with_no_speculation": told.compared,
        "wrong": len(told.wrong),
        "failed": len(told.failed),
        "preemptions": after["num_preemptions"],
        "prefix_cache_hits": after["prefix_cache_hits"],
        "generated_tokens": after["generation_tokens"],
        "draft_passes": after["spec_decode_num_drafts"],
        "drafted_tokens": after["spec_decode_num_draft_tokens"],
        "accepted_tokens": after["spec_decode_num_accepted_tokens"],
        "memory_growth_mb": round(growth, 1),
        "memory_mb": [round(m) for m in told.memory_mb[:: max(1, len(told.memory_mb) // 20)]],
    }
    keep(request.node.callspec.id, figures)
    assert told.wrong == []
    assert told.failed == []
    assert done >= min(REQUESTS, 200), "too few in the time given; set MINUTES"
    assert told.left > done / 50
    assert after["num_preemptions"] > done / 20
    assert after["prefix_cache_hits"] > 0
    assert after["spec_decode_num_accepted_tokens"] > done / 2
    assert growth < MAX_GROWTH_MB, figures["memory_mb"]


def keep(name: str, figures: dict[str, Any]) -> None:
    """Put the figures beside those of the other run."""
    path = ROOT / "build" / "soak.json"
    path.parent.mkdir(exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(runs | {name: figures}, indent=1) + "\n")


def idle(server: Server) -> None:
    """Wait until the server has noticed who left; then nothing runs and no block is in use."""
    for _ in range(60):
        now = counted(server)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        if not any(now[name] for name in names):
            return
        time.sleep(1)
    pytest.fail(f"still busy: {[(name, now[name]) for name in names]}")
