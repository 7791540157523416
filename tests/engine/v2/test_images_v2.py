"""Requests with images beside texts, on the V2 runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.engines import drafting, greedy
from support.family_pairs import make_pair
from support.outputs import continuations
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import K, engine

MAX_TOKENS = 12


def test_images_and_texts_in_one_batch(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="make test-families brings it")
    from support.vision import SeeingReference, mixed_requests, write_processor

    pair = make_pair(tmp_path, "qwen3-vl")
    reference = SeeingReference(pair.head, pair.target, write_processor(pair.target))
    requests = mixed_requests(6)
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
    with engine(drafting(K, pair.head), **options) as llm, watching(llm, plain) as watch:
        assert continuations(llm.generate(prompts, params, use_tqdm=False)) == plain
    assert_all_equal(reference, watch, at_least=60)
