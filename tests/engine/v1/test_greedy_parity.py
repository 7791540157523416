"""Greedy output with speculation is the output without it, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from support.drafts import truth, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.heads import make_head
from support.outputs import Tokens, continuations, counting
from support.paths import HEAD

MAX_TOKENS = 32
SUBSET = 32
# Mean tokens per target forward of the trained head at K=4 on these prompts; a head that is
# served wrongly stays lossless but falls to about 1.
MIN_TOKENS_PER_STEP = 2.2

Plain = dict[Tokens, Tokens]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Greedy continuations of all prompts by the target alone."""
    outputs = run_plain({"all": Job(prompts(), greedy(MAX_TOKENS))})["all"]
    return continuations(outputs)


@pytest.fixture(scope="module")
def llm(plain: Plain) -> Iterator[LLM]:
    with engine(drafting(4)) as llm:
        yield llm


def test_prompts_are_many_and_distinct(plain: Plain) -> None:
    assert len(set(prompts())) == len(plain) >= 200
    assert len(set(plain.values())) >= 150, "a target that says one thing only proves nothing"


def test_four_drafts(llm: LLM, plain: Plain) -> None:
    with counting(llm) as counted:
        outputs = llm.generate(list(prompts()), greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs) == plain
    assert counted["spec_decode_num_drafts"] > 0
    assert counted.tokens_per_step >= MIN_TOKENS_PER_STEP


def test_four_drafts_with_every_number_accepted(llm: LLM, plain: Plain) -> None:
    with watching(truth(plain)) as watch:
        outputs = llm.generate(list(prompts()), greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs) == plain
    assert min(watch.helped[n] for n in range(5)) >= 50


def test_one_by_one_equals_batch(llm: LLM, plain: Plain) -> None:
    for prompt in prompts()[:4]:
        outputs = llm.generate([prompt], greedy(MAX_TOKENS), use_tqdm=False)
        assert continuations(outputs).items() <= plain.items()


def all_slots() -> int:
    from vllm_specformer.config import read_head_config

    return read_head_config(HEAD).num_draft_slots


@pytest.mark.parametrize(
    "num_tokens",
    [1, pytest.param(2, marks=pytest.mark.slow), None],
    ids=["one", "two", "all-slots"],
)
def test_other_numbers_of_drafts(num_tokens: int | None, plain: Plain) -> None:
    wanted = num_tokens or all_slots()
    with engine(drafting(num_tokens)) as llm, watching(truth(plain)) as watch:
        outputs = llm.generate(list(prompts()[:SUBSET]), greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= plain.items()
    assert {k for _, k in watch.batch_sizes} == {wanted}
    assert watch.helped[wanted] > 0


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {}),
        pytest.param("default", {}, marks=pytest.mark.slow),
        ("default", {"num_key_value_heads": 4, "head_dim": 32, "num_draft_slots": 5}),
        (
            "paper",
            {"use_bonus_embedding": True, "markov_rank": 8, "markov_gate": True}
            | {"draft_vocab_size": 700},
        ),
    ],
    ids=["paper", "no-markov", "other-kv-shape", "paper-bonus-gates-vocabulary"],
)
def test_other_heads(tmp_path: Path, plain: Plain, preset: str, changes: dict) -> None:
    head = make_head(tmp_path / "head", preset, **changes)
    with engine(drafting(4, head)) as llm, watching(truth(plain)) as watch:
        outputs = llm.generate(list(prompts()[:SUBSET]), greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= plain.items()
    assert min(watch.helped[n] for n in range(5)) > 0
