"""Pages that vLLM's offloading has taken away and brought back, the head's among them, on V2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from support.cpu_offloading import OFFLOADING
from support.dense import DenseReference
from support.engines import drafting, greedy
from support.outputs import Tokens, continuations, counting
from support.paths import HEAD
from support.v2.drafts import assert_all_equal, watching
from support.v2.engines import LONG, MAX_TOKENS, K, engine


@pytest.fixture(autouse=True)
def no_connector_stays() -> Iterator[None]:
    yield
    ensure_kv_transfer_shutdown()


def test_the_head_finds_its_context_in_what_was_loaded(answers: dict[Tokens, Tokens]) -> None:
    """Without vLLM's own prefix cache, so that the second time everything comes from outside."""
    params = greedy(MAX_TOKENS)
    options = {
        "kv_transfer_config": OFFLOADING,
        "enable_prefix_caching": False,
        "block_size": 32,
    }
    with engine(drafting(K), **options) as llm:
        for text in LONG:
            llm.generate([text], params, use_tqdm=False)
        with watching(llm, answers) as watch, counting(llm) as counted:
            outputs = llm.generate(LONG, params, use_tqdm=False)
    assert counted["external_prefix_cache_hits"] > 0
    assert continuations(outputs).items() <= answers.items()
    assert_all_equal(DenseReference(HEAD), watch, at_least=6)
