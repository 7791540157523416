"""Bytes and operations of a step on paper, against counts by PyTorch and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from support.paths import HEAD, TARGET
from vllm_specformer.config import read_head_config
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.head_fields import HeadFields
from vllm_specformer.planning.chips import CHIPS, Chip, find_chip
from vllm_specformer.planning.roofline import Work, attention, draft_step, matmul, target_step
from vllm_specformer.shapes import HeadShape, TargetShape

# Qwen3-8B's own config.json.
QWEN3_8B = TargetShape(36, 4096, 32, 8, 128, 12288, 151936)
# Qwen3-30B-A3B's own config.json.
QWEN3_MOE = TargetShape(48, 2048, 32, 4, 128, 768, 151936, 128, 8)
ONE = Chip("one", 1.0, 1.0, "")


def bundled() -> TargetShape:
    return TargetShape.from_config(json.loads((TARGET / "config.json").read_bytes()))


def bundled_head() -> HeadShape:
    config = read_head_config(HEAD)
    return HeadShape.from_fields({name: getattr(config, name) for name in HeadFields.model_fields})


def test_operations_of_a_target_step_are_those_that_pytorch_counts() -> None:
    target = AutoModelForCausalLM.from_pretrained(
        TARGET, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = 7
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        target(torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
    step = target_step(bundled(), batch=1, rows=tokens, context=tokens)
    # The rotary angles are a product too, [D/2, 1] x [1, tokens], which the roofline leaves out.
    rotary = 2 * (bundled().head_dim // 2) * tokens
    assert step.total.flops == pytest.approx(counter.get_total_flops(), abs=rotary)


def test_parameters_are_those_of_the_models() -> None:
    target = AutoModelForCausalLM.from_pretrained(TARGET)
    matrices = sum(p.numel() for p in target.parameters() if p.dim() > 1)
    assert bundled().parameters == matrices  # input and output embedding are one matrix here
    head, shape = SpecFormerHead.from_pretrained(HEAD), bundled_head()
    counted = sum(
        module.weight.numel()
        for name, module in head.named_modules()
        if isinstance(module, torch.nn.Linear) and "markov" not in name
    )
    assert shape.shared_parameters + shape.slots * shape.slot_parameters == counted
    assert QWEN3_8B.parameters - 151936 * 4096 == pytest.approx(6.95e9, rel=0.001)  # model card
    assert QWEN3_MOE.parameters == pytest.approx(30.5e9 - 151936 * 2048, rel=0.01)  # model card


def test_a_single_row_moves_the_weights_once() -> None:
    step = target_step(QWEN3_8B, batch=1, rows=1, context=0)
    assert step.total.bytes == pytest.approx(2 * QWEN3_8B.parameters, rel=0.002)
    half = target_step(QWEN3_8B, batch=1, rows=1, context=0, weight_bytes=1)
    assert half.total.bytes == pytest.approx(QWEN3_8B.parameters, rel=0.004)


def test_the_cache_is_read_once_however_many_rows_ask() -> None:
    one, five = (attention(16, rows, 1000, QWEN3_8B, 2) for rows in (1, 5))
    assert one.bytes == five.bytes == 16 * 1000 * 2 * 8 * 128 * 2
    assert five.flops == 5 * one.flops


def test_few_tokens_of_a_mixture_read_few_experts() -> None:
    def weights(batch: int) -> float:
        return target_step(QWEN3_MOE, batch, 1, 0).parts["feed-forward"].bytes

    expert = 3 * 2048 * 768 * 2
    assert weights(1) == pytest.approx(48 * 8 * expert, rel=0.02)
    assert weights(1024) > 48 * 127 * expert
    assert weights(8) > 6 * weights(1)


def test_a_part_takes_the_longer_of_bytes_and_operations() -> None:
    assert Work(3, 2).seconds(ONE) == 3
    assert Work(3, 5).seconds(ONE) == 5
    step = target_step(QWEN3_8B, 1, 1, 1000)
    assert step.seconds(ONE) == sum(max(w.bytes, w.flops) for w in step.parts.values())
    assert matmul(2, 3, 5, weight_bytes=1, state_bytes=2) == Work(15 + 2 * 8 * 2, 2 * 2 * 3 * 5)


def test_verified_rows_are_free_below_the_ridge_and_cost_above_it() -> None:
    chip = CHIPS["h200"]

    def growth(batch: int) -> float:
        one, five = (target_step(QWEN3_8B, batch, rows, 100).seconds(chip) for rows in (1, 5))
        return five / one

    assert growth(1) < 1.02
    assert growth(256) > 3


def test_draft_step_without_drafts_stores_only() -> None:
    head = HeadShape.default_for(QWEN3_8B)
    assert list(draft_step(head, 8, 0, 1000).parts) == ["context"]
    assert (
        draft_step(head, 8, 4, 1000).parts["context"]
        == (draft_step(head, 8, 2, 1000, context_rows=5).parts["context"])
    )


def test_draft_step_counts_what_the_head_has() -> None:
    head = replace(bundled_head(), markov_rank=0, bonus=False)
    plain = draft_step(head, 1, 4, 0).total
    assert draft_step(replace(head, bonus=True), 1, 4, 0).total.flops - plain.flops == 2 * 256**2
    markov = draft_step(replace(head, markov_rank=64), 1, 4, 0).parts["markov"]
    assert markov.flops == 4 * 2 * 64 * 2048
    pruned = draft_step(replace(head, scored=512), 1, 4, 0)
    assert pruned.parts["logits"].flops * 4 == 2 * 4 * 256 * 2048
    blind = draft_step(replace(head, mixed=False), 1, 4, 1000)
    assert "slot attention" not in blind.parts
    # A head that was not trained for fewer slots runs all of its own.
    whole = draft_step(replace(head, nested=False), 1, 4, 0).parts["slots"]
    assert whole == draft_step(head, 1, 8, 0).parts["slots"]


def test_chips() -> None:
    assert find_chip("H100").ridge == pytest.approx(295, abs=1)
    assert find_chip("h200").derated(0.9, 0.8).bytes_per_second == pytest.approx(4.32e12)
    with pytest.raises(SpecFormerError, match=r"--chip v100: unknown; choose one of a100, h100"):
        find_chip("v100")


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(SpecFormerError, match="field 'hidden_size' is missing"):
        TargetShape.from_config({"num_attention_heads": 4})


def test_importing_the_roofline_imports_no_torch() -> None:
    code = "import sys, vllm_specformer.planning.roofline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
