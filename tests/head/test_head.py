"""The head's mathematics against independent references, and what its slots may and must see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from specformer_kernels.markov_bias import markov_bias
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_specformer import head as head_module
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head import Attend, SpecFormerHead, rotate
from vllm_specformer.head_layers import rotary_table

SIZE, VOCAB, LENGTH, BATCH = 16, 23, 9, 2
KINDS = {
    "paper": {"use_bonus_embedding": False, "slot_mask": "slots"},
    "default": {"use_bonus_embedding": True, "slot_mask": "mixed"},
    "default-one-slot": {"use_bonus_embedding": True, "slot_mask": "mixed", "num_draft_slots": 1},
    "paper-five-slots": {"use_bonus_embedding": False, "slot_mask": "slots", "num_draft_slots": 5},
    "default-seven-slots": {
        "use_bonus_embedding": True,
        "slot_mask": "mixed",
        "num_draft_slots": 7,
        "num_key_value_heads": 1,
    },
    "default-two-slot-layers": {
        "use_bonus_embedding": True,
        "slot_mask": "mixed",
        "num_slot_layers": 2,
    },
    "default-window": {
        "use_bonus_embedding": True,
        "slot_mask": "mixed",
        "context_window": 2,
        "context_sinks": 1,
    },
    "paper-three-slot-layers": {
        "use_bonus_embedding": False,
        "slot_mask": "slots",
        "num_slot_layers": 3,
    },
}


def make(**changes: Any) -> SpecFormerHead:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": SIZE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "max_position_embeddings": 32,
        "num_draft_slots": 3,
        "aux_hidden_state_layer_ids": (0, 2, 4),
        "nested_slots": True,
        "use_bonus_embedding": True,
        "slot_mask": "mixed",
        "markov_rank": 0,
        "target_architecture": "Qwen3ForCausalLM",
        "target_num_layers": 4,
        "target_name_or_path": "t",
    }
    torch.manual_seed(0)
    head = SpecFormerHead(SpecFormerConfig(**(fields | changes))).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def inputs(head: SpecFormerHead) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hooked states, anchors (first, last and some between) and bonus embeddings."""
    torch.manual_seed(1)
    hooks = len(head.config.aux_hidden_state_layer_ids)
    states = [torch.randn(BATCH, LENGTH, SIZE, dtype=torch.double) for _ in range(hooks)]
    anchors = torch.tensor([[0, 3, LENGTH - 1], [5, 1, 6]])
    return states, anchors, torch.randn(BATCH, 3, SIZE, dtype=torch.double)


@pytest.fixture(params=sorted(KINDS))
def head(request: pytest.FixtureRequest) -> SpecFormerHead:
    return make(**KINDS[request.param])


# --- an independent reference: explicit loops, complex rotation, no shared code ---


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def turn(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of one head's vector [D] as multiplication of complex numbers."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angles = position * theta ** (-torch.arange(half, dtype=torch.double) * 2 / len(x))
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated.real, rotated.imag])


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query [heads, D] over lists of [K/V heads, D]: [heads * D]."""
    group = len(query) // len(keys[0])
    out = []
    for index, q in enumerate(query):
        scores = torch.stack([(q * k[index // group]).sum() for k in keys]) * len(q) ** -0.5
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        out.append(sum(w * v[index // group] for w, v in zip(weights, values, strict=True)))
    return torch.cat(out)


def separate(head: SpecFormerHead) -> dict[str, Tensor]:
    """The head's weights with fused projections taken apart."""
    config, weights = head.config, dict(head.named_parameters())
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
    for name in [n for n in weights if n.endswith("qkv_proj.weight")]:
        parts = weights.pop(name).split(rows)
        for part, letter in zip(parts, "qkv", strict=True):
            weights[name.replace("qkv_proj", f"{letter}_proj")] = part
    for name in [n for n in weights if n.endswith("gate_up_proj.weight")]:
        gate, up = weights.pop(name).chunk(2)
        weights[name.replace("gate_up", "gate")] = gate
        weights[name.replace("gate_up", "up")] = up
    return weights


def naive(
    head: SpecFormerHead, states: list[Tensor], anchor: int, bonus: Tensor, count: int
) -> Tensor:
    """States [count, H] of an anchor's leading slots; hooked states G x [T, H] of one sequence."""
    config, w = head.config, separate(head)
    eps, theta, dim = config.rms_norm_eps, config.rope_theta, config.head_dim

    def heads(x: Tensor, name: str) -> Tensor:
        return (w[name] @ x).view(-1, dim)

    def rotated(x: Tensor, position: int) -> Tensor:
        return torch.stack([turn(h, position, theta) for h in x])

    context = []
    for position in range(anchor + 1):
        parts = [
            norm(state[position], w["hook_norm_weight"][g], eps) for g, state in enumerate(states)
        ]
        context.append(w["fc.weight"] @ torch.cat(parts))
    normed = [norm(c, w["context_norm.weight"], eps) for c in context]
    keys = [rotated(heads(c, "context_attn.k_proj.weight"), t) for t, c in enumerate(normed)]
    values = [heads(c, "context_attn.v_proj.weight") for c in normed]
    if config.context_window:
        first, last = range(config.context_sinks), range(anchor + 1)[-config.context_window :]
        seen = sorted({*first, *last} & {*range(anchor + 1)})
        keys, values = [keys[t] for t in seen], [values[t] for t in seen]
    query = rotated(heads(normed[-1], "context_attn.q_proj.weight"), anchor)
    hidden = context[-1] + w["context_attn.o_proj.weight"] @ attention(query, keys, values)
    if config.use_bonus_embedding:
        hidden = hidden + w["bonus_proj.weight"] @ norm(bonus, w["bonus_norm.weight"], eps)
    opened = w["positional_proj.weight"] @ norm(hidden, w["positional_norm.weight"], eps)
    slots = list((opened + w["positional_proj.bias"]).view(config.num_draft_slots, -1))[:count]
    for layer in range(config.num_slot_layers):
        at = f"more_slot_layers.{layer - 1}." if layer else ""
        queries, own_keys, own_values = [], [], []
        for index, slot in enumerate(slots):
            x = norm(slot, w[f"{at}slot_norm.weight"], eps)
            q, k, v = (heads(x, f"{at}slot_attn.{letter}_proj.weight") for letter in "qkv")
            if config.slot_mask == "mixed":
                q, k = rotated(q, anchor + 1 + index), rotated(k, anchor + 1 + index)
            queries.append(q)
            own_keys.append(k)
            own_values.append(v)
        if config.slot_mask == "mixed":
            own_keys, own_values = keys + own_keys, values + own_values
        out = []
        for slot, q in zip(slots, queries, strict=True):
            y = slot + w[f"{at}slot_attn.o_proj.weight"] @ attention(q, own_keys, own_values)
            x = norm(y, w[f"{at}ffn_norm.weight"], eps)
            gate = w[f"{at}ffn.gate_proj.weight"] @ x
            inner = gate * torch.sigmoid(gate) * (w[f"{at}ffn.up_proj.weight"] @ x)
            out.append(y + w[f"{at}ffn.down_proj.weight"] @ inner)
        slots = out
    return torch.stack(slots)


@torch.no_grad()
@pytest.mark.parametrize("cut", [0, 1])
def test_equals_the_naive_reference(head: SpecFormerHead, cut: int) -> None:
    """Also for fewer slots than the head has, which then see only each other."""
    states, anchors, bonus = inputs(head)
    count = max(1, head.config.num_draft_slots - cut)
    slots = head(states, anchors, bonus, count)
    assert slots.shape == (BATCH, 3, count, SIZE)
    for b in range(BATCH):
        for a in range(3):
            hooked, anchor = [s[b] for s in states], int(anchors[b, a])
            expected = naive(head, hooked, anchor, bonus[b, a], count)
            # The rotary table is stored in float32, the reference's angles in float64.
            torch.testing.assert_close(slots[b, a], expected, rtol=2e-5, atol=2e-5)


def test_rotation_equals_complex_multiplication() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.double)
    positions = torch.tensor([0, 1, 7, 30, 63])
    got = rotate(x, rotary_table(64, 8, 1000.0), positions)
    expected = [[turn(h, int(p), 1000.0) for h in row] for row, p in zip(x, positions, strict=True)]
    torch.testing.assert_close(
        got, torch.stack([torch.stack(r) for r in expected]), rtol=1e-5, atol=1e-5
    )


def test_rotary_table_covers_slots_past_the_last_position() -> None:
    head = make(num_draft_slots=5)
    assert len(head.rotary(torch.device("cpu"))) == 32 + 5


# --- who sees whom ---


def grad_by_position(head: SpecFormerHead, anchor: int) -> Tensor:
    """Magnitude of the slots' gradient with respect to every position's hooked states: [T]."""
    states, _, bonus = inputs(head)
    states = [s[:1].requires_grad_() for s in states]
    slots = head(states, torch.tensor([[anchor]]), bonus[:1, :1])
    grads = torch.autograd.grad(slots.pow(2).sum(), states)
    return sum(g[0].abs().sum(-1) for g in grads)


def test_what_an_anchor_sees(head: SpecFormerHead) -> None:
    """No token after it, and all up to it but for those between sinks and window."""
    window, sinks = head.config.context_window or LENGTH, head.config.context_sinks
    for anchor in (0, 4, LENGTH - 1):
        seen = grad_by_position(head, anchor) > 0
        for position in range(LENGTH):
            near = anchor - window < position <= anchor
            assert seen[position] == (near or position < min(sinks, anchor + 1))


@torch.no_grad()
def test_anchors_and_sequences_do_not_mix(head: SpecFormerHead) -> None:
    states, anchors, bonus = inputs(head)
    together = head(states, anchors, bonus)
    for b in range(BATCH):
        for a in range(3):
            alone = head(
                [s[b : b + 1] for s in states], anchors[b : b + 1, a : a + 1],
                bonus[b : b + 1, a : a + 1],
            )  # fmt: skip
            torch.testing.assert_close(alone[0, 0], together[b, a])


def attend_each_other(head: SpecFormerHead) -> Attend:
    return lambda query, *own: head._attend(query, None, None, None, *own)


def test_every_slot_sees_every_slot() -> None:
    for kind in ("paper", "default"):
        head = make(**KINDS[kind])
        slots = torch.randn(1, 1, 3, SIZE, dtype=torch.double, requires_grad=True)
        out = head.run_slots(slots, torch.tensor([[2]]), attend_each_other(head))
        for slot in range(3):
            (grad,) = torch.autograd.grad(out[0, 0, slot].pow(2).sum(), slots, retain_graph=True)
            assert (grad[0, 0].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_bonus_token_matters_only_where_it_should() -> None:
    for kind, matters in (("paper", False), ("default", True)):
        head = make(**KINDS[kind])
        states, anchors, bonus = inputs(head)
        same = torch.equal(head(states, anchors, bonus), head(states, anchors, bonus + 1))
        assert same is not matters
    paper = make(**KINDS["paper"])
    states, anchors, _ = inputs(paper)
    assert torch.isfinite(paper(states, anchors)).all()


@torch.no_grad()
def test_paper_slots_reach_the_context_through_the_anchor_only() -> None:
    """With the attention's output fixed, other context changes nothing; the mixed mask differs."""
    for kind, matters in (("paper", False), ("default", True)):
        head = make(**KINDS[kind])
        head.context_attn.o_proj.weight.zero_()
        states, _, bonus = inputs(head)
        anchors = torch.tensor([[4], [4]])
        changed = [s.clone() for s in states]
        for state in changed:
            state[:, :4] += 1
        before, after = head(states, anchors, bonus[:, :1]), head(changed, anchors, bonus[:, :1])
        assert torch.equal(before, after) is not matters


@torch.no_grad()
def test_context_key_value_ignores_bonus_and_neighbours() -> None:
    """What makes the paged cache exact: one position's K/V is a function of that position."""
    head = make()
    states, _, _ = inputs(head)
    positions = torch.arange(LENGTH)
    _, key, value = head.context_qkv(head.combine(states), positions.expand(BATCH, LENGTH))
    for t in range(LENGTH):
        alone = head.context_qkv(head.combine([s[:, t] for s in states]), positions[[t, t]])
        torch.testing.assert_close(key[:, t], alone[1])
        torch.testing.assert_close(value[:, t], alone[2])


@torch.no_grad()
def test_parts_of_a_projection_equal_the_whole() -> None:
    """What the engine stores and asks with is what the dense head trains with."""
    head = make()
    states, _, _ = inputs(head)
    normed = head.context_norm(head.combine(states))
    query, key, value = head.context_attn(normed)
    torch.testing.assert_close(head.context_attn.query(normed), query)
    for part, whole in zip(head.context_attn.key_value(normed), (key, value), strict=True):
        torch.testing.assert_close(part, whole)


# --- drafting ---


def test_greedy_drafts_without_markov_are_independent() -> None:
    head = make()
    logits = torch.randn(4, 3, VOCAB, dtype=torch.double)
    drafts = head.draft(logits, torch.arange(4))
    assert drafts.tolist() == logits.argmax(-1).tolist()


def test_markov_term_conditions_each_slot_on_the_token_before() -> None:
    head = make(markov_rank=2)
    embed, out = head.markov_embed.weight.detach(), head.markov_lm_head.weight.detach()
    logits = torch.randn(4, 3, VOCAB, dtype=torch.double)
    bonus = torch.tensor([0, 5, 11, 22])
    drafts = head.draft(logits, bonus)
    for row in range(4):
        previous = int(bonus[row])
        for slot in range(3):
            scores = [
                float(logits[row, slot, v] + (embed[previous] * out[v]).sum()) for v in range(VOCAB)
            ]
            previous = max(range(VOCAB), key=scores.__getitem__)
            assert int(drafts[row, slot]) == previous
    assert drafts.tolist() != logits.argmax(-1).tolist()


def test_gates_scale_the_markov_term_slot_by_slot() -> None:
    head = make(markov_rank=2, markov_gate=True)
    embed, out = head.markov_embed.weight.detach(), head.markov_lm_head.weight.detach()
    states = torch.randn(4, 3, SIZE, dtype=torch.double)
    logits = torch.randn(4, 3, VOCAB, dtype=torch.double)
    bonus = torch.tensor([0, 5, 11, 22])
    gates = head.markov_gates(states)
    assert gates is not None
    drafts = head.draft(logits, bonus, gates)
    for row in range(4):
        previous = int(bonus[row])
        for slot in range(3):
            gate = 1 + head.markov_gate.weight.detach() @ states[row, slot]
            scaled = embed[previous] * (gate if slot else 0)
            scores = [float(logits[row, slot, v] + (scaled * out[v]).sum()) for v in range(VOCAB)]
            previous = max(range(VOCAB), key=scores.__getitem__)
            assert int(drafts[row, slot]) == previous
    assert drafts.tolist() != head.draft(logits, bonus).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("markov_gate", [False, True])
def test_the_term_in_one_launch_is_the_same(
    markov_gate: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by the reference of the kernel; and with any leading dimensions."""
    head = make(markov_rank=2, markov_gate=markov_gate).to(dtype)
    logits = torch.randn(2, 4, 3, VOCAB, dtype=dtype)
    gates = head.markov_gates(torch.randn(2, 4, 3, SIZE, dtype=dtype))
    tokens = torch.randint(VOCAB, (2, 4))
    of_slots = list(head_module.slot_by_slot(logits, gates))
    apart = [head.biased(own, slot, tokens, gate) for slot, (own, gate) in enumerate(of_slots)]
    launched: list[Tensor] = []

    def noted(own: Tensor, *others: Any) -> Tensor:
        launched.append(own)
        return markov_bias(own, *others)

    monkeypatch.setattr(head_module, "is_fused", lambda logits: True)
    monkeypatch.setattr(head_module, "markov_bias", noted)
    for slot, (own, gate) in enumerate(of_slots):
        assert torch.equal(head.biased(own, slot, tokens, gate), apart[slot])
    assert len(launched) == 3 - markov_gate


def test_the_term_is_one_launch_on_a_gpu() -> None:
    with FakeTensorMode():
        logits = torch.ones(2, device="cuda")
        assert head_module.is_fused(logits)
        assert not head_module.is_fused(torch.ones(2))
        torch.set_autocast_enabled("cuda", True)
        try:
            assert not head_module.is_fused(logits)
        finally:
            torch.set_autocast_enabled("cuda", False)


def test_markov_term_starts_at_zero() -> None:
    """A fresh head drafts as if it had no Markov term; training fades it in. Gates begin at 1."""
    config = make(markov_rank=4, markov_gate=True).config
    torch.manual_seed(0)
    fresh = SpecFormerHead(config)
    assert not fresh.markov_logits(torch.arange(VOCAB)).any()
    assert fresh.markov_embed.weight.any()
    gates = fresh.markov_gates(torch.randn(2, SIZE))
    assert gates is not None
    assert (gates[1:] == 1).all()
    assert not gates[0].any()  # the first slot's


@torch.no_grad()
def test_fewer_slots_with_the_bias_that_amx_wants() -> None:
    """vLLM's CPU build keeps it in float32 there, beside weights of 16 bits."""
    head = make().bfloat16()
    normed = torch.randn(4, SIZE, dtype=torch.bfloat16)
    expected = head.open_slots(normed, 2)
    head.positional_proj.bias.data = head.positional_proj.bias.data.float()
    assert torch.equal(head.open_slots(normed, 2), expected)


# --- files ---


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"markov_rank": 4, "markov_gate": True}, {"num_slot_layers": 3}],
    ids=lambda changes: str(changes),
)
def test_survives_saving(tmp_path: Path, changes: dict[str, Any]) -> None:
    head = make(**changes).float()
    head.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = SpecFormerHead.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == head.state_dict().keys()
    states, anchors, bonus = inputs(head)
    arguments = [s.float() for s in states], anchors, bonus.float()
    assert torch.equal(loaded(*arguments), head(*arguments))


@torch.no_grad()
def test_further_slot_layers_only_add_names(tmp_path: Path) -> None:
    """A file of a head with one layer, from before there could be more, is read as it was."""
    one, two = (make(num_slot_layers=number).state_dict().keys() for number in (1, 2))
    assert {name.split(".")[0] for name in two - one} == {"more_slot_layers"}
    head = make().float()
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("num_slot_layers") == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SpecFormerHead.from_pretrained(tmp_path)
    assert loaded.config.num_slot_layers == 1
    assert loaded.state_dict().keys() == one
