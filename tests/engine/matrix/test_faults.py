"""Things that go wrong while serving: nothing is lost, and other requests do not notice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.outputs import token_ids
from support.paths import HEAD

pytestmark = pytest.mark.matrix

TEXTS = prompts()[:16]
LENGTH = 128  # of the longest request, prompt included
ROOM = {"max_model_len": LENGTH, "max_num_seqs": 64, "max_num_batched_tokens": 512}
JOBS = {
    "some": Job(TEXTS, greedy(16)),
    "to the end": Job(TEXTS, greedy(LENGTH, ignore_eos=True)),
    "one token": Job(TEXTS, greedy(1)),
    "500": Job([prompts()[i % 200] for i in range(500)], greedy(4)),
}


@pytest.fixture(scope="module")
def plain() -> dict[str, list]:
    return {name: token_ids(outputs) for name, outputs in run_plain(JOBS, **ROOM).items()}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(HEAD, tmp_path_factory.mktemp("served") / "head"))


@pytest.fixture(scope="module")
def llm(plain: dict[str, list], head: Path) -> Iterator[LLM]:
    with engine(drafting(4, head), **ROOM) as llm:
        yield llm


@pytest.mark.parametrize("name", JOBS)
def test_answers(llm: LLM, plain: dict[str, list], name: str) -> None:
    """Up to the maximum length, one token long, many more than the engine runs at once."""
    assert token_ids(JOBS[name].run(llm)) == plain[name]


def test_requests_reach_the_maximum_length(llm: LLM) -> None:
    for output in JOBS["to the end"].run(llm):
        prompt, answer = output.prompt_token_ids or [], output.outputs[0].token_ids
        assert len(prompt) + len(answer) == LENGTH


def test_a_bias_for_the_whole_vocabulary(llm: LLM, plain: dict[str, list]) -> None:
    bias = SamplingParams(temperature=0, max_tokens=4, logit_bias=dict.fromkeys(range(2048), 1.0))
    for name, text in zip("abc", TEXTS, strict=False):
        llm.llm_engine.add_request(name, text, greedy(16))
    with pytest.raises(VLLMValidationError, match="logit_bias"):
        llm.llm_engine.add_request("biased", TEXTS[0], bias)
    found = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            found[output.request_id] = [tuple(output.outputs[0].token_ids)]
    assert [found[name] for name in "abc"] == plain["some"][:3]


def test_head_replaced_while_serving(llm: LLM, plain: dict[str, list], head: Path) -> None:
    """The head in memory is a copy: its file may be truncated and written anew."""
    path = head / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(100)
    assert token_ids(JOBS["some"].run(llm)) == plain["some"]
    path.unlink()
    shutil.rmtree(head)
    assert token_ids(JOBS["some"].run(llm)) == plain["some"]
