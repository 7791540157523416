"""LoRA adapters of queries and values on the V2 runner; run by `make test-matrix`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.lora.request import LoRARequest

from support.adapters import LORA, make_adapter
from support.engines import drafting, greedy
from support.outputs import Tokens
from support.v2.engines import MAX_TOKENS, TEXTS, K, engine
from support.v2.tree_attention import tree_attention

OPTIONS = LORA | {"lora_target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("trees", [{}, {"tree_nodes": 8}], ids=["chains", "trees"])
def test_adapters_and_none_in_one_batch(trees: dict[str, Any], tmp_path: Path) -> None:
    lora = LoRARequest("noise", 1, str(make_adapter(tmp_path / "adapter", 1, with_head=False)))
    texts = TEXTS[:8]

    def answers(llm: LLM, adapters: list[LoRARequest | None]) -> list[Tokens]:
        outputs = llm.generate(texts, greedy(MAX_TOKENS), use_tqdm=False, lora_request=adapters)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    none: list[LoRARequest | None] = [None] * len(texts)
    mixed = [None, lora] * (len(texts) // 2)
    with tree_attention() if trees else nullcontext():
        with engine(**OPTIONS) as llm:
            alone, expected = answers(llm, none), answers(llm, mixed)
        assert alone[1::2] != expected[1::2]
        with engine(drafting(K, **trees), **OPTIONS) as llm:
            assert answers(llm, none) == alone
            assert answers(llm, mixed) == expected
