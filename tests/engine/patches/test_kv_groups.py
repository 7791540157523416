"""The target's KV-cache groups are what they are without the head, by vLLM's own functions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from support.kv_groups import table as kv_groups
from support.kv_groups.settings import BFLOAT16, Setting
from support.kv_groups.targets import TARGETS, Target
from vllm_specformer.engine import head_pages
from vllm_specformer.engine.attention import DraftAttentionBackend
from vllm_specformer.engine.head_pages import HeadShape, check_cache, layers_needed
from vllm_specformer.engine.patches import ledger
from vllm_specformer.engine.patches.kv_groups import head_layer_name
from vllm_specformer.errors import SpeculativeConfigError

BY_NAME = {target.name: target for target in TARGETS}
SUBSET = [
    "Qwen3-Next-80B-A3B",
    "Gemma 4 31B",
    "gpt-oss-20b",
    "Nemotron-H-8B",
    "Kimi-Linear-48B-A3B",
]


@pytest.fixture
def plain() -> Iterator[ModuleType]:
    """vLLM's grouping without our change."""
    patched = kv_cache_utils.get_kv_cache_groups
    kv_cache_utils.get_kv_cache_groups = getattr(patched, "__wrapped__", patched)
    yield kv_cache_utils
    kv_cache_utils.get_kv_cache_groups = patched


def committed() -> list[dict[str, str]]:
    with kv_groups.RESULT.open(newline="") as file:
        return list(csv.DictReader(file))


def test_no_row_of_the_table_has_more_groups_with_a_head() -> None:
    table = committed()
    assert len(table) == len(TARGETS) * 2 * 3 * 2
    assert {row["target"] for row in table} == set(BY_NAME)
    refused = [row for row in table if row["refused"]]
    assert len(refused) < 10
    for row in table:
        assert row["refused"] or row["groups_with_head"] == row["groups_alone"]
    assert kv_groups.as_document(table) in kv_groups.DOCUMENT.read_text()


@pytest.mark.parametrize("name", SUBSET)
def test_the_table_is_what_vllm_says(name: str) -> None:
    found = [{k: str(v) for k, v in row.items()} for row in kv_groups.rows((BY_NAME[name],))]
    assert found == [row for row in committed() if row["target"] == name]


def test_a_refused_row_is_served_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = next(row for row in committed() if row["refused"])
    assert "VLLM_KV_CACHE_LAYOUT" in refused["refused"]
    assert "LBHNC" in refused["refused"]
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
    keys = BY_NAME[refused["target"]], refused["kv_dtype"], refused["backend"], int(refused["tp"])
    row = kv_groups.row(*keys)
    assert not row["refused"]
    assert row["groups_with_head"] == row["groups_alone"]


@pytest.mark.parametrize(
    ("name", "backend", "kv_dtype", "exploded"),
    [
        ("gpt-oss-20b", "FlashInfer", "bf16", 25),
        ("gpt-oss-20b", "FlashAttention", "fp8", 25),
        ("Qwen3-Next-80B-A3B", "FlashInfer", "bf16", 49),
        ("Gemma 4 31B", "FlashAttention", "bf16", 61),
    ],
)
def test_a_spec_of_its_own_would_explode_the_groups(
    name: str, backend: str, kv_dtype: str, exploded: int, plain: ModuleType
) -> None:
    """What the table would show if the head asked for the pages it needs."""
    target = BY_NAME[name]
    setting = Setting(target, kv_dtype, backend, 1, drafts=4)
    kv_heads, head_size = target.head
    block_size = setting.config.cache_config.block_size
    own = FullAttentionSpec(
        block_size=block_size, num_kv_heads=kv_heads, head_size=head_size, dtype=BFLOAT16
    )
    assert len(setting.groups({head_layer_name(99): own})) == exploded


# Full-attention layers, windowed ones, and layers of the head.
COUNTS = [(12, 6, 1), (12, 12, 8), (4, 24, 1), (10, 50, 2), (3, 30, 5), (1, 1, 1), (6, 0, 3)]


@pytest.mark.parametrize(("full", "windowed", "of_head"), COUNTS)
def test_layers_of_any_number_join_one_group(full: int, windowed: int, of_head: int) -> None:
    """With equal specs, too, the numbers of layers would change the groups."""
    attention = ((full, 8, 64, 0), *([(windowed, 8, 64, 128)] if windowed else []))
    target = Target("", (8 * of_head, 64), attention)
    setting = Setting(target, "bf16", "FlashAttention", 1, drafts=4)
    specs = setting.head_specs(HeadShape(8 * of_head, 64, BFLOAT16))
    assert len(specs) == layers_needed(16, 8 * of_head)
    ledger.apply(["kv_groups"])
    alone, together = setting.groups({}), setting.groups(specs)
    assert [set(g.layer_names) for g in alone] == [
        set(g.layer_names) - specs.keys() for g in together
    ]
    assert [g.kv_cache_spec for g in alone] == [g.kv_cache_spec for g in together]
    (joined,) = (g for g in together if specs.keys() & set(g.layer_names))
    assert joined.layer_names[-len(specs) :] == list(specs)


def test_some_numbers_of_layers_change_plain_groups(plain: ModuleType) -> None:
    """Which is why the head joins afterwards: this is vLLM alone on the same specs."""
    changed = []
    for full, windowed, _ in COUNTS[:5]:
        attention = ((full, 8, 64, 0), (windowed, 8, 64, 128))
        setting = Setting(Target("", (8, 64), attention), "bf16", "FlashAttention", 1, drafts=4)
        specs = setting.head_specs(HeadShape(8, 64, BFLOAT16))
        changed.append(len(setting.groups({})) != len(setting.groups(specs)))
    assert changed == [True, False, True, False, True]


def test_a_group_of_several_specs() -> None:
    """Full attention of two shapes: one group, in which every layer has a spec of its own."""
    target = Target("", (8, 64), ((2, 8, 64, 0), (3, 4, 64, 0)))
    setting = Setting(target, "fp8", "FlashInfer", 1, drafts=4)
    specs = setting.head_specs(HeadShape(8, 64, BFLOAT16))
    ledger.apply(["kv_groups"])
    (group,) = setting.groups(specs)
    assert group.layer_names[-2:] == list(specs)
    assert {name: group.kv_cache_spec.kv_cache_specs[name] for name in specs} == specs


def test_the_target_keeps_its_layout() -> None:
    """Prefill and decode instances with and without a head agree about it."""
    for backend in (TritonAttentionBackend, *(pair[0] for pair in kv_groups.BACKENDS.values())):
        alone = get_supported_kv_cache_layouts([backend])
        assert get_supported_kv_cache_layouts([backend, DraftAttentionBackend]) == alone


def config(**text: Any) -> Any:
    model = SimpleNamespace(model="some/model", hf_text_config=SimpleNamespace(**text))
    return SimpleNamespace(
        model_config=SimpleNamespace(
            **vars(model), use_mla=False, is_attention_free=False, is_hybrid=False
        ),
        cache_config=SimpleNamespace(sliding_window=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=8),
        speculative_config=SimpleNamespace(
            draft_parallel_config=SimpleNamespace(tensor_parallel_size=8)
        ),
        kv_transfer_config=None,
    )


def test_windows_everywhere_are_refused_before_weights() -> None:
    windowed = config(layer_types=["sliding_attention"] * 4, sliding_window=128)
    with pytest.raises(SpeculativeConfigError, match=r"sliding_window=128 .* disable_hybrid_kv"):
        check_cache(windowed)
    windowed.scheduler_config.disable_hybrid_kv_cache_manager = True
    check_cache(windowed)
    every_layer = config()
    every_layer.cache_config.sliding_window = 4096
    with pytest.raises(SpeculativeConfigError, match="sliding_window=4096 in every layer"):
        check_cache(every_layer)
    check_cache(config(layer_types=["sliding_attention", "full_attention"], sliding_window=128))
    check_cache(config(layer_types=["sliding_attention"], sliding_window=None))


def test_a_recurrent_target_is_refused_before_weights() -> None:
    recurrent = config()
    recurrent.model_config.is_attention_free = True
    with pytest.raises(SpeculativeConfigError, match="has no attention layer"):
        check_cache(recurrent)


def test_recurrent_layers_on_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent = config()
    recurrent.model_config.is_hybrid = True
    monkeypatch.setattr(head_pages, "HAS_TRITON", False)
    with pytest.raises(SpeculativeConfigError, match=r"has recurrent layers.*serve it on a GPU"):
        check_cache(recurrent)
    monkeypatch.setattr(head_pages, "HAS_TRITON", True)
    check_cache(recurrent)


def test_connectors_and_caches_that_cannot_be_shared() -> None:
    moved = config()
    moved.kv_transfer_config, moved.model_config.use_mla = object(), True
    with pytest.raises(SpeculativeConfigError, match="draft_tensor_parallel_size=1"):
        check_cache(moved)
    moved.speculative_config.draft_parallel_config.tensor_parallel_size = 1
    check_cache(moved)
    moved.attention_config.hisparse_config = object()
    with pytest.raises(SpeculativeConfigError, match="hisparse_config"):
        check_cache(moved)


def test_windowed_layers_that_are_kept_whole_lend_their_spec() -> None:
    """Without vLLM's hybrid manager windows lose no pages: one group, as without the head."""
    target = Target("", (8, 64), ((6, 8, 64, 128),))
    setting = Setting(target, "bf16", "FlashAttention", 1, drafts=4)
    shape = HeadShape(8, 64, BFLOAT16)
    with pytest.raises(SpeculativeConfigError, match=r"SlidingWindowSpec; .*disable_hybrid_kv"):
        setting.head_specs(shape)
    setting.config.scheduler_config.disable_hybrid_kv_cache_manager = True
    ledger.apply(["kv_groups"])
    assert isinstance(setting.groups({})[0].kv_cache_spec, SlidingWindowSpec)
    (group,) = setting.groups(setting.head_specs(shape))
    assert isinstance(group.kv_cache_spec, FullAttentionSpec)
    assert len(group.layer_names) == 7


def test_a_target_without_attention_is_refused() -> None:
    target = Target("Mamba", (8, 64), ((1, 8, 64, 0),), mamba=(3, 512, 16, 64, 64))
    setting = Setting(target, "bf16", "FlashAttention", 1, drafts=4)
    del setting.layers["model.layers.0.attn"]
    with pytest.raises(SpeculativeConfigError, match=r"caches are MambaSpec; .* full attention"):
        setting.head_specs(HeadShape(8, 64, BFLOAT16))


def test_a_head_whose_keys_are_too_large_is_refused() -> None:
    target = Target("", (1, 256), ((2, 1, 64, 0),))
    setting = Setting(target, "fp8", "FlashAttention", 1, drafts=4)
    with pytest.raises(SpeculativeConfigError, match=r"kv_cache_dtype='fp8': .* 128 bytes .* 512"):
        setting.head_specs(HeadShape(1, 256, BFLOAT16))
