"""The fields that define a SpecFormer head, each described and validated once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_specformer.errors import SpecFormerError

MAX_SLOTS = 64
# Far beyond any model; products of larger sizes would overflow before anything could explain it.
MAX_SIZE = 1 << 20
MAX_POSITIONS = 1 << 28
MAX_SLOT_LAYERS = 8
MIN_TARGET_LAYERS = 4
MIN_RANKING, MAX_RANKING = 0.01, 100.0
MAX_CALIBRATION = 100.0


class HeadConfigError(SpecFormerError):
    """A head's configuration is unusable; the message names field, value and remedy."""


Size = Annotated[int, Field(gt=0, le=MAX_SIZE)]


class HeadFields(BaseModel):
    """All choices that define a head. `H` is the hidden size, `K` the number of draft slots.

    A field with a default may be absent from files; it is always written.
    """

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, allow_inf_nan=False)

    vocab_size: Size = Field(description="Target vocabulary; logits come from its lm_head.")
    hidden_size: Size = Field(description="Target hidden size H.")
    num_attention_heads: Size = Field(description="Query heads of both attentions.")
    num_key_value_heads: Size = Field(description="K/V heads; divides the query heads.")
    head_dim: Size = Field(multiple_of=2, description="Size of one attention head.")
    intermediate_size: Size = Field(description="Width of the SwiGLU of the slots.")
    rms_norm_eps: float = Field(gt=0, description="Epsilon of every RMSNorm of the head.")
    rope_theta: float = Field(gt=0, description="Base of the rotary embedding.")
    max_position_embeddings: int = Field(
        gt=0,
        le=MAX_POSITIONS,
        description="Positions the rotary embedding covers; at least the target's.",
    )
    num_draft_slots: int = Field(
        ge=1, le=MAX_SLOTS, description="K, the tokens drafted in one pass; serving may use fewer."
    )
    aux_hidden_state_layer_ids: tuple[int, ...] = Field(
        min_length=1,
        description="Hooked states in vLLM's numbering: 0 is the embedding output, i the state "
        "after layer i, the last id the state after the last layer BEFORE the final norm.",
    )
    nested_slots: bool = Field(
        description="Trained with varying numbers of slots, so that serving fewer than K computes "
        "only those; otherwise all K are computed, because slots see each other, and cut."
    )
    use_bonus_embedding: bool = Field(
        description="Condition the slots on the sampled (bonus) token's embedding."
    )
    num_slot_layers: int = Field(
        1,  # heads written before the field was there have one
        ge=1,
        le=MAX_SLOT_LAYERS,
        description="Layers of slot attention and SwiGLU. Under the mixed mask all of them read "
        "the one context K/V of the head; queries, and the slots' own K/V, are each layer's.",
    )
    slot_mask: Literal["slots", "mixed"] = Field(
        description="What a slot attends to: the other slots only (the paper), or the whole "
        "context as well, in one softmax."
    )
    context_window: int = Field(
        0,
        ge=0,
        le=MAX_POSITIONS,
        description="Tokens up to the anchor, itself included, that anchor and slots attend to; "
        "0: all.",
    )
    context_sinks: int = Field(
        0,
        ge=0,
        le=MAX_POSITIONS,
        description="With a window: first tokens of the text that they attend to besides.",
    )
    markov_rank: int = Field(
        ge=0,
        le=MAX_SIZE,
        description="Rank of the term that adds U[previous token] V to a slot's logits; 0: none. "
        "It makes sampling sequential over the slots (the head still runs once).",
    )
    markov_gate: bool = Field(
        False,  # heads written before the field was there have none
        description="Let each slot scale the entries of U[previous token] by its own state, so "
        "that the term depends on the context too. The first slot then has no term, because its "
        "previous token is the bonus token.",
    )
    draft_vocab_size: int = Field(
        0,
        ge=0,
        description="N, the tokens the head scores, `draft_token_ids` in its weights; 0: all.",
    )
    tree_ranking: tuple[float, ...] = Field(
        (),
        description="Temperature per slot that divides log-probabilities where nodes of different "
        "slots of a tree are ranked; empty: 1 everywhere. It decides what is drafted, never what "
        "is emitted. `specformer eval --fit-tree-ranking` finds and writes it.",
    )
    tree_ranking_sampled: tuple[float, ...] = Field(
        (), description="The same for requests with a temperature; empty: `tree_ranking`."
    )
    acceptance_calibration: tuple[float, ...] = Field(
        (),
        description="How probably a greedy request's drafts are accepted: one slope for all slots, "
        "then an intercept for each, of chance = sigmoid(slope * log-odds of the slot's largest "
        "probability + intercept); empty: that probability itself. It decides what is verified, "
        "never what is emitted. `specformer eval --calibrate` fits and writes it.",
    )
    acceptance_calibration_sampled: tuple[float, ...] = Field(
        (),
        description="The same for requests whose drafts are drawn, by the probability at their "
        "temperature; empty: that probability itself.",
    )
    target_architecture: str = Field(min_length=1, description="Target's architecture name.")
    target_num_layers: int = Field(
        ge=MIN_TARGET_LAYERS,
        le=MAX_SIZE,
        description="Decoder layers of the target the head was trained for.",
    )
    target_name_or_path: str = Field(
        min_length=1,
        description="Where the target is: an absolute path, a path from this file on, or a name of "
        "the hub (see places.py).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> HeadFields:
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} must be at most "
                f"vocab_size={self.vocab_size}, the target's; 0 scores all of it"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.context_sinks and not self.context_window:
            raise ValueError(
                f"context_sinks={self.context_sinks} needs a context_window: without one the whole "
                "context is seen; set one, or context_sinks=0"
            )
        if self.markov_gate and not self.markov_rank:
            raise ValueError(
                "markov_gate=true needs a markov_rank above 0: it scales the entries of that term; "
                "set one, or markov_gate=false"
            )
        for name in ("tree_ranking", "tree_ranking_sampled"):
            taus = getattr(self, name)
            if taus and len(taus) != self.num_draft_slots:
                raise ValueError(
                    f"{name}={list(taus)} must have num_draft_slots={self.num_draft_slots} "
                    "temperatures, one per slot, or none"
                )
            if not all(MIN_RANKING <= tau <= MAX_RANKING for tau in taus):
                raise ValueError(
                    f"{name}={list(taus)} must lie in {MIN_RANKING:g}..{MAX_RANKING:g}; "
                    "1 leaves scores as they are"
                )
        for name in ("acceptance_calibration", "acceptance_calibration_sampled"):
            values = getattr(self, name)
            if values and len(values) != self.num_draft_slots + 1:
                raise ValueError(
                    f"{name}={list(values)} must have a slope and num_draft_slots="
                    f"{self.num_draft_slots} intercepts, one per slot, or nothing"
                )
            if values and not (values[0] > 0 and max(map(abs, values)) <= MAX_CALIBRATION):
                raise ValueError(
                    f"{name}={list(values)} must have a slope above 0 and nothing beyond "
                    f"{MAX_CALIBRATION:g}; empty it, or fit it with `specformer eval --calibrate`"
                )
        ids = self.aux_hidden_state_layer_ids
        if list(ids) != sorted(set(ids)):
            raise ValueError(
                f"aux_hidden_state_layer_ids={list(ids)} must be strictly increasing: vLLM sorts "
                "and de-duplicates hooks, so any other order would reach the head permuted"
            )
        if ids[0] < 0 or ids[-1] > self.target_num_layers:
            raise ValueError(
                f"aux_hidden_state_layer_ids={list(ids)} must lie in 0..{self.target_num_layers} "
                "(the target's number of layers)"
            )
        return self
