"""Requests with images beside texts: the head counts tokens, whatever positions the target has.

Run by `make test-families`, which brings the torchvision that these models want.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.drafts import compare, truth, watching
from support.engines import drafting, engine, greedy
from support.family_pairs import make_pair
from support.outputs import continuations

MAX_TOKENS = 40


@pytest.mark.families
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_images_and_texts_in_one_batch(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="make test-families brings it")
    from support.vision import SeeingReference, mixed_requests, write_processor

    pair = make_pair(tmp_path, family)
    reference = SeeingReference(pair.head, pair.target, write_processor(pair.target))
    requests = mixed_requests()
    prompts = [request.prompt for request in requests]
    params = greedy(MAX_TOKENS, detokenize=False, ignore_eos=True)
    options: dict[str, Any] = {
        "model": str(pair.target),
        "max_model_len": 192,
        "limit_mm_per_prompt": {"image": 2, "video": 0},
    }
    with engine(None, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    plain = continuations(outputs)
    reference.show(outputs, requests)
    with engine(drafting(4, pair.head), **options) as llm:
        with watching() as alone:
            assert continuations(llm.generate(prompts, params, use_tqdm=False)) == plain
        with watching(truth(plain)) as helped:
            assert continuations(llm.generate(prompts, params, use_tqdm=False)) == plain
    assert min(helped.helped[n] for n in range(5)) > 0
    result = compare(reference, [*alone.drafted, *helped.drafted])
    assert result.wrong == []
    assert result.compared >= 1000
    assert result.ties <= result.compared // 100
