"""A new head begins at a loss near ln(V), whatever its random weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.start import flattest, start_flat

V, H = 512, 64
# The slots' random parts are a quarter as long as the biases, so the loss is a little above.
NEAR = 1.15


@pytest.fixture
def target() -> PreTrainedModel:
    """One whose lm_head is sure of every state, as that of a trained model is."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=H,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        architectures=["Qwen3ForCausalLM"],
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    torch.nn.init.uniform_(model.model.norm.weight, 0.2, 2)
    model.lm_head.weight.data[:, 7] *= 0.01  # a direction that says little
    return model


def first_loss(model: PreTrainedModel, head: SpecFormerHead, target: HookedTarget) -> float:
    """Mean cross entropy of random labels."""
    states, _ = target(torch.randint(V, (2, 30)))
    anchors = torch.arange(4, 28).expand(2, -1)
    embeds = target.embed(torch.randint(V, anchors.shape))
    with torch.no_grad():
        logits = target.logits(head(states, anchors, embeds))
    labels = torch.randint(V, logits.shape[:-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()))


def test_the_loss_begins_near_the_logarithm_of_the_vocabulary(target: PreTrainedModel) -> None:
    config = SpecFormerConfig.preset("default", target.config, "t", num_draft_slots=3)
    hooked = HookedTarget(target, config.aux_hidden_state_layer_ids)
    head = SpecFormerHead(config)
    assert first_loss(target, head, hooked) > 1.5 * math.log(V)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    start_flat(head, hooked)
    assert first_loss(target, head, hooked) < NEAR * math.log(V)
    changed = [name for name, value in head.state_dict().items() if not value.equal(before[name])]
    assert changed == ["positional_proj.bias"]
    biases = head.positional_proj.bias.view(3, H)
    assert biases[0].equal(biases[1])


def test_the_flattest_direction(target: PreTrainedModel) -> None:
    hooked = HookedTarget(target, [0, 5])
    direction = flattest(hooked, H)
    assert direction.pow(2).mean() == pytest.approx(1, abs=1e-5)
    assert direction.abs().argmax() == 7
    assert direction[7] > 0
    with torch.no_grad():
        flat = hooked.logits(direction).std()
        others = hooked.logits(torch.randn(100, H)).std(-1)
    assert flat < 0.1 * others.min()


def test_only_scored_tokens_count(target: PreTrainedModel) -> None:
    """With a draft vocabulary it is their logits that are to be equal."""
    hooked = HookedTarget(target, [0, 5])
    target.lm_head.weight.data[:50, 9] = 1.0
    hooked.score_only(torch.arange(50))
    direction = flattest(hooked, H)
    with torch.no_grad():
        assert hooked.logits(direction).std() < 0.05
