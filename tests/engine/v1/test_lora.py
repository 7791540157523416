"""LoRA adapters: each request's text is as without speculation; the head drafts without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import LLM
from vllm.lora.request import LoRARequest

from support.adapters import LORA, make_adapter
from support.dense import DenseReference
from support.drafts import compare, watching
from support.engines import drafting, engine, greedy, prompts
from support.heads import make_head
from support.outputs import Tokens, counting
from support.paths import HEAD

TEXTS = prompts()[:9]
Answers = list[Tokens]


def answers(llm: LLM, adapters: list[LoRARequest | None]) -> Answers:
    outputs = llm.generate(TEXTS, greedy(32), use_tqdm=False, lora_request=adapters)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    "vocabulary", [0, pytest.param(700, marks=pytest.mark.slow)], ids=["bundled", "vocabulary"]
)
def test_adapters_and_none_in_one_batch(tmp_path: Path, vocabulary: int) -> None:
    loras = [
        LoRARequest(f"noise-{seed}", seed, str(make_adapter(tmp_path / f"{seed}", seed)))
        for seed in (1, 2)
    ]
    mixed: list[LoRARequest | None] = [None, *loras] * (len(TEXTS) // 3)
    with engine(**LORA) as llm:
        alone, expected = answers(llm, [None] * len(TEXTS)), answers(llm, mixed)
    assert all(a != e for a, e, m in zip(alone, expected, mixed, strict=True) if m is not None)

    head = HEAD
    if vocabulary:
        head = make_head(tmp_path / "head", "default", draft_vocab_size=vocabulary)
    with engine(drafting(4, head), **LORA) as llm:
        with watching() as watch, counting(llm) as counted:
            assert answers(llm, [None] * len(TEXTS)) == alone
        assert answers(llm, mixed) == expected
    assert compare(DenseReference(head), watch.drafted).wrong == []
    assert vocabulary or counted["spec_decode_num_accepted_tokens"] > 50
