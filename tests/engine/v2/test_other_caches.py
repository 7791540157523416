"""Targets whose KV cache is not what the head's own would be, and a window over it, on V2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from support.dense import DenseReference
from support.drafts import compare
from support.engines import drafting, greedy
from support.heads import make_head
from support.outputs import Tokens, continuations
from support.processor import HAS_AVX512
from support.seen_states import SeenStates
from support.v2.drafts import assert_all_equal, seeing, watching
from support.v2.engines import LONG, MAX_TOKENS, TEXTS, K, engine, groups_of, runner
from support.v2.triton_ops import use_triton

CACHES = [("fixed sizes", 2, 1), ("other shapes", 4, 2)]
if HAS_AVX512:  # not skipped: the parent allows no test of this folder to be
    CACHES.append(("fp8", 2, 4))


def test_a_window_over_the_context(
    tmp_path: Path, answers: dict[Tokens, Tokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the head's Triton kernels; without the window it would draft other tokens."""
    window = {"context_window": 24, "context_sinks": 3}
    head = make_head(tmp_path / "head", "default", num_draft_slots=K, **window)
    reference, params = DenseReference(head), greedy(MAX_TOKENS)
    use_triton(monkeypatch)
    with engine(drafting(K, head)) as llm, watching(llm, answers) as watch:
        outputs = llm.generate([*TEXTS[:3], LONG[0]], params, use_tqdm=False)
    assert continuations(outputs).items() <= answers.items()
    assert_all_equal(reference, watch, at_least=40)
    reference.head.config.context_window = 0
    assert compare(reference, watch.drafted).wrong


@pytest.mark.parametrize(
    ("cache", "kv_heads", "layers"),
    CACHES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_drafts(
    cache: str, kv_heads: int, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's K and V keep their dtype; the target's group has its own spec, and layers more.

    On the head's Triton kernels, which find K and V in layers of their own.
    """
    options: dict[str, Any] = {"enable_prefix_caching": False}
    if cache == "fp8":
        options["kv_cache_dtype"] = "fp8_e4m3"
    elif cache == "fixed sizes":  # the backend's spec is customised then
        sizes = staticmethod(lambda kv_cache_spec=None: [32])
        monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", sizes)
        options["block_size"] = 32
    head = make_head(tmp_path / "head", "default", num_draft_slots=K, num_key_value_heads=kv_heads)
    reference, params = SeenStates(head), greedy(MAX_TOKENS)
    with engine(None, **options) as llm:
        ((target_layers, target_spec),) = groups_of(llm)
        plain = continuations(llm.generate(TEXTS[:5], params, use_tqdm=False))
    use_triton(monkeypatch)
    with (
        engine(drafting(K, head), **options) as llm,
        watching(llm, plain) as watch,
        seeing(reference, runner(llm).req_states),
    ):
        assert groups_of(llm) == [(target_layers + layers, target_spec)]
        assert continuations(llm.generate(TEXTS[:5], params, use_tqdm=False)) == plain
    assert_all_equal(reference, watch, at_least=40)
