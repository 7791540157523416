"""The sizes of target and head that decide what a step costs, read from their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_specformer.errors import SpecFormerError

MARKOV_RANK = 64  # of the Markov term that `specformer train` gives a head by default


@dataclass(frozen=True)
class TargetShape:
    """A decoder with gated feed-forward layers, dense or a mixture of experts.

    Attributes:
        intermediate: width of the feed-forward layer, or of one expert.
        experts, experts_per_token: 0 and 0 for a dense model.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TargetShape:
        """From the content of a Hugging Face `config.json`.

        Raises:
            SpecFormerError: a size is missing.
        """
        text = config.get("text_config") or config
        try:
            heads, hidden = text["num_attention_heads"], text["hidden_size"]
            experts = text.get("num_experts") or text.get("num_local_experts") or 0
            narrow = text.get("moe_intermediate_size") if experts else None
            return cls(
                layers=text["num_hidden_layers"],
                hidden=hidden,
                heads=heads,
                kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or hidden // heads,
                intermediate=narrow or text["intermediate_size"],
                vocab=text["vocab_size"],
                experts=experts,
                experts_per_token=text["num_experts_per_tok"] if experts else 0,
            )
        except KeyError as error:
            raise SpecFormerError(
                f"target configuration: field {error} is missing, which the cost of a step "
                "depends on",
                "name a directory with the configuration of a language model",
            ) from None

    @property
    def parameters(self) -> int:
        """Weights of the layers and of the output matrix; an input embedding is only looked up."""
        width = self.heads * self.head_dim
        attention = 2 * self.hidden * (width + self.kv_heads * self.head_dim)
        feed_forward = 3 * self.hidden * self.intermediate * max(1, self.experts)
        router = self.hidden * self.experts
        return self.layers * (attention + feed_forward + router) + self.vocab * self.hidden


@dataclass(frozen=True)
class HeadShape:
    """A SpecFormer head; `scored` tokens have logits, `hooks` hidden states come in."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    slots: int
    scored: int
    hooks: int = 4
    slot_layers: int = 1
    mixed: bool = True
    bonus: bool = True
    nested: bool = True
    markov_rank: int = 0
    markov_gate: bool = False
    visible: int = 0  # most context tokens that it sees; 0: all

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> HeadShape:
        """From the fields of a head, by the names they have in `head_fields.HeadFields`."""
        return cls(
            hidden=fields["hidden_size"],
            heads=fields["num_attention_heads"],
            kv_heads=fields["num_key_value_heads"],
            head_dim=fields["head_dim"],
            intermediate=fields["intermediate_size"],
            slots=fields["num_draft_slots"],
            scored=fields.get("draft_vocab_size") or fields["vocab_size"],
            hooks=len(fields["aux_hidden_state_layer_ids"]),
            slot_layers=fields.get("num_slot_layers", 1),
            mixed=fields["slot_mask"] == "mixed",
            bonus=fields["use_bonus_embedding"],
            nested=fields["nested_slots"],
            markov_rank=fields["markov_rank"],
            markov_gate=fields.get("markov_gate", False),
            visible=fields.get("context_window", 0) + fields.get("context_sinks", 0),
        )

    @classmethod
    def default_for(cls, target: TargetShape, slots: int = 8) -> HeadShape:
        """The default shape of `specformer train` for a target, its gated Markov term included."""
        return cls(
            hidden=target.hidden,
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_dim=target.head_dim,
            intermediate=target.intermediate * max(1, target.experts_per_token),
            slots=slots,
            scored=target.vocab,
            markov_rank=MARKOV_RANK,
            markov_gate=True,
        )

    @property
    def shared_parameters(self) -> int:
        """Weights that do not grow with the number of slots (the paper's m_s), without lm_head."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * heads + 2 * kv)
        layer = attention + 3 * self.hidden * self.intermediate
        combine = self.hooks * self.hidden * self.hidden + self.bonus * self.hidden**2
        return combine + attention + self.slot_layers * layer

    @property
    def slot_parameters(self) -> int:
        """Weights of each slot of its own (the paper's m_p): its projection."""
        return self.hidden**2
