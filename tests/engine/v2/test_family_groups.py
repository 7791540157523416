"""Targets whose layers differ, so that vLLM has several groups of K/V pages, on the V2 runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.dense import DenseReference
from support.engines import drafting, greedy
from support.family_pairs import make_pair
from support.outputs import continuations
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import K, engine, groups_of, speculator

MAX_TOKENS = 12


@pytest.mark.parametrize("family", ["gemma4", "gpt-oss"])
def test_several_groups(family: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, family)
    reference = DenseReference(pair.head, pair.target)
    params = greedy(MAX_TOKENS, detokenize=False, ignore_eos=True)
    inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in pair.prompts[:6]]
    changes = {"model": str(pair.target), "skip_tokenizer_init": True, "max_model_len": 192}
    with engine(None, **changes) as llm:
        alone = groups_of(llm)
        plain = continuations(llm.generate(inputs, params, use_tqdm=False))
    with engine(drafting(K, pair.head), **changes) as llm, watching(llm, plain) as watch:
        together = groups_of(llm)
        assert len(together) > 1
        assert [spec for _, spec in together] == [spec for _, spec in alone]
        of_head = len(speculator(llm).model.attn.layers)
        assert sum(n for n, _ in together) == sum(n for n, _ in alone) + of_head
        assert speculator(llm).group is not None
        assert continuations(llm.generate(inputs, params, use_tqdm=False)) == plain
    assert_all_equal(reference, watch, at_least=60)
