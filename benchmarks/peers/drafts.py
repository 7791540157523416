"""What the library's heads draft at every anchor of a known text, all anchors at once.

The library has forward passes for training only; these are the passes of serving, by its own layers
and masks, greedy. What is drafted first does not depend on how much is drafted, in all four kinds
(layers over a block are causal by default), so fewer drafts are the first ones of more.
"""

from __future__ import annotations

from typing import Any

import torch
from speculators.models.dflash.attention import create_anchor_block_mask_mod
from speculators.models.eagle3.attention import (
    create_combined_mask_mod,
    extend_dense_mask_for_draft_tokens,
)
from speculators.models.peagle.attention import create_peagle_mask_mod
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import DynamicCache

from peers.library import layers_of


@torch.no_grad()
def drafts(model: Any, tokens: Tensor, states: Tensor, first: int, count: int) -> Tensor:
    """
    Args:
        tokens: int64 [T].
        states: the target's, float32 [T, layers, H].
        first: anchor. Anchors are all places from there on that have a token behind them: the
            target has seen so much, and has sampled that token.

    Returns:
        int64 [anchors, count]
    """
    kind = model.config.speculators_model_type
    ids = tokens[None]
    context = layers_of(states[None, :-1], model.target_layer_ids)
    if kind in ("dflash", "dspark"):
        return _block(model, ids, context, first, count)[0]
    draft = {"eagle3": _eagle3, "peagle": _peagle}[kind]
    return draft(model, ids, context, first, count)[0]


def _dense(mask_mod: Any, rows: int, columns: int) -> Tensor:
    return create_mask(mask_mod, None, None, rows, columns, device="cpu")


def _fused(model: Any, states: Tensor) -> Tensor:
    """EAGLE's view of the hooked layers."""
    if model.input_norm is not None:
        states = model.input_norm(states)
    if model.fc_norm is not None:
        parts = states.chunk(len(model.fc_norm), -1)
        states = torch.cat([norm(x) for norm, x in zip(model.fc_norm, parts, strict=True)], -1)
    return model.fc(states)


def _one_document(length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.long)


def _eagle3(model: Any, ids: Tensor, states: Tensor, first: int, count: int) -> Tensor:
    """One pass per draft, each on the draft before and the head's own last state."""
    hidden, tokens = _fused(model, states), ids[:, 1:]
    length = hidden.shape[1]
    positions = 1 + torch.arange(length)[None]
    mask = _dense(create_combined_mask_mod(_one_document(length), length), length, length)
    cache, found = DynamicCache(), []
    for step in range(count):
        x = torch.cat([model.embed_tokens(tokens), hidden], -1)
        rotation = model.rotary_emb(x, positions)
        for layer in model.layers:
            x = layer(
                x,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                cache_position=torch.arange(step * length, (step + 1) * length),
                position_embeddings=rotation,
            )
        normed = model.norm(x)
        tokens = model.lm_head(normed).argmax(-1)
        found.append(tokens)
        hidden = normed if model.config.norm_output else x
        mask = extend_dense_mask_for_draft_tokens(mask, length)
        positions = positions + 1
    return torch.stack(found, -1)[:, first:]


def _peagle(model: Any, ids: Tensor, states: Tensor, first: int, count: int) -> Tensor:
    """One pass: behind each anchor stand masks, one per further draft."""
    length, size = states.shape[1:]
    anchors = torch.arange(first, length)
    masked = len(anchors) * (count - 1)
    anchor = torch.cat([torch.arange(length), anchors.repeat(count - 1)])
    further = torch.arange(1, count).repeat_interleave(len(anchors))
    depth = torch.cat([_one_document(length), further])
    tokens = torch.cat([ids[:, 1:], ids.new_full((1, masked), model.mask_token_id)], 1)
    states = torch.cat([states, model.mask_hidden.expand(1, masked, size)], 1)
    x = torch.cat([model.embed_tokens(tokens), _fused(model, states)], -1)
    positions = (anchor + depth)[None]
    rotation = model.rotary_emb(x, positions)
    mod = create_peagle_mask_mod(anchor, depth, _one_document(length))
    mask = _dense(mod, len(anchor), len(anchor))
    for layer in model.layers:
        x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
    drafted = torch.cat([x[:, first:length], x[:, length:]], 1)
    drafted = drafted.view(1, count, len(anchors), -1).transpose(1, 2)
    return model.lm_head(model.norm(drafted)).argmax(-1)


def _block(model: Any, ids: Tensor, states: Tensor, first: int, count: int) -> Tensor:
    """One pass over a block per anchor; DSpark adds what the draft before says."""
    context = model.hidden_norm(model.fc(states))
    length = context.shape[1]
    bonus = torch.arange(first, length) + 1
    from_anchor = model.config.sample_from_anchor
    width = count if from_anchor else count + 1
    tokens = ids.new_full((1, len(bonus), width), model.mask_token_id)
    tokens[:, :, 0] = ids[:, bonus]
    x = model.embed_tokens(tokens.flatten(1))
    behind = (bonus[:, None] + torch.arange(width)).flatten()
    positions = torch.cat([torch.arange(length), behind])[None]
    rotation = model.rotary_emb(context, positions)
    masks: dict[int | None, Tensor] = {}
    for number, layer in enumerate(model.layers):
        window = model.sliding_window if number in model.sliding_window_indices else None
        if window not in masks:
            # The last bonus token is one past the last state, in the same document.
            document = _one_document(length + 1)
            non_causal = model.sliding_window_non_causal
            masks[window] = _dense(
                *create_anchor_block_mask_mod(document, length, bonus, width, window, non_causal)
            )
        x = layer(
            hidden_states=x,
            target_hidden=context,
            attention_mask=masks[window],
            position_ids=positions,
            use_cache=False,
            position_embeddings=rotation,
        )
    slots = model.norm(x).view(1, len(bonus), width, -1)[:, :, width - count :]
    logits = model.lm_head(slots)
    markov = getattr(model, "markov_head", None)
    return logits.argmax(-1) if markov is None else _chained(markov, slots, logits, ids[:, bonus])


def _chained(markov: Any, slots: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
    """Drafts by DSpark's sequential head, each on the one before."""
    if markov.head_type == "rnn":
        raise ValueError("an rnn head keeps a state from draft to draft")
    found = []
    for slot in range(slots.shape[2]):
        bias = markov.block_bias(
            prev_token_ids=tokens.flatten()[:, None], hidden_states=slots[0, :, slot : slot + 1]
        )
        tokens = (logits[:, :, slot] + bias.transpose(0, 1)).argmax(-1)
        found.append(tokens)
    return torch.stack(found, -1)
