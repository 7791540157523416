"""Greedy output with speculation on the V2 runner is the output without it, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.heads import make_head
from support.outputs import Tokens, continuations, counting
from support.paths import HEAD
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import MAX_TOKENS, TEXTS, K, engine, runner
from vllm_specformer.config import read_head_config
from vllm_specformer.engine.compat.versions import installed_vllm
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


def test_prompts_are_many_and_distinct(answers: dict[Tokens, Tokens]) -> None:
    assert len(set(TEXTS)) >= 24
    assert len(set(answers.values())) >= 20, "a target that says one thing only proves nothing"


def test_four_drafts(answers: dict[Tokens, Tokens]) -> None:
    """As it is served, and with the oracle, so that every number of drafts is accepted."""
    with engine(drafting(K)) as llm:
        assert isinstance(runner(llm), GPUModelRunner)
        assert type(runner(llm).speculator) is SpecFormerSpeculator
        with counting(llm) as counted:
            outputs = llm.generate(TEXTS, greedy(MAX_TOKENS), use_tqdm=False)
        with watching(llm, answers) as watch, counting(llm) as helped:
            repeated = llm.generate(TEXTS, greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert len(continuations(outputs)) == len(TEXTS)
    assert counted["spec_decode_num_drafts"] > 0
    assert continuations(repeated) == continuations(outputs)
    assert min(watch.helped[n] for n in range(K + 1)) > 0
    accepted, drafted = (helped[f"spec_decode_num_{n}_tokens"] for n in ("accepted", "draft"))
    print(
        f"tokens per step {counted.tokens_per_step:.2f}, with the oracle "
        f"{helped.tokens_per_step:.2f} ({accepted} of {drafted} drafts accepted)"
    )
    assert drafted * 0.1 < accepted < drafted


@pytest.mark.parametrize("slots", [1, None], ids=["one", "all-slots"])
def test_other_numbers_of_drafts(slots: int | None, answers: dict[Tokens, Tokens]) -> None:
    wanted = slots or read_head_config(HEAD).num_draft_slots
    with engine(drafting(slots)) as llm, watching(llm, answers) as watch:
        outputs = llm.generate(TEXTS[:8], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    # From 0.33 on a step of prefill chunks alone drafts nothing.
    _, version = installed_vllm()
    assert set(watch.tokens) == ({wanted} if version.startswith("0.32.") else {0, wanted})
    assert watch.helped[wanted] > 0


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {"draft_vocab_size": 700, "markov_rank": 8, "markov_gate": True}),
        ("default", {"num_key_value_heads": 4, "num_draft_slots": 5, "num_slot_layers": 2}),
    ],
    ids=["paper-vocabulary-gates", "no-markov-other-kv-shape-two-slot-layers"],
)
def test_other_heads(
    tmp_path: Path, answers: dict[Tokens, Tokens], preset: str, changes: dict[str, Any]
) -> None:
    """Random heads, their drafts held against the dense head as well."""
    head = make_head(tmp_path / "head", preset, **changes)
    with engine(drafting(K, head)) as llm, watching(llm, answers) as watch:
        outputs = llm.generate(TEXTS[:8], greedy(MAX_TOKENS), use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert min(watch.helped[n] for n in range(K + 1)) > 0
    assert_all_equal(DenseReference(head), watch, at_least=40)
