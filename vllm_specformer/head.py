"""The SpecFormer head in plain PyTorch: it trains, it is served, and it is the engine's oracle.

Source: Shi et al., "Scaling LLM Speculative Decoding: Non-Autoregressive Forecasting in
Large-Batch Scenarios", AAAI 2026 (arXiv 2511.20340), equations 7-10.

The mathematics stands here once, as small methods over arbitrary leading dimensions. `forward`
strings them together with dense attention for training; the engine strings the same methods
together with attention over its paged cache. Shapes: `H` hidden size, `K` draft slots, `G` hooked
states, `D` head size, `T` tokens, `A` anchors, `V` target tokens, `N` of them scored. An *anchor*
is a context position `t` at which the head drafts: token `t+1` is the bonus token the target has
just sampled, slot `i` predicts `t+2+i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from specformer_kernels.grouped_rms_norm import grouped_rms_norm
from specformer_kernels.kv_store import rotate
from specformer_kernels.markov_bias import markov_bias
from specformer_kernels.rotate_slots import rotate_slots
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.head_layers import Projections, RMSNorm, SlotLayer, rotary_table

# Query, key and value of the slots -> what the slots' attention gives, shaped as the query.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def slot_by_slot(logits: Tensor, gates: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each slot's logits [..., N] and gates [..., rank], of [..., K, N] and [..., K, rank]."""
    of_gates = (None,) * logits.shape[-2] if gates is None else gates.unbind(-2)
    return zip(logits.unbind(-2), of_gates, strict=True)


def is_fused(logits: Tensor) -> bool:
    """Whether these logits get their Markov term in one launch.

    On a CPU the module multiplies: vLLM has packed its weights there. So it does under autocast,
    where a training evaluates a float32 head: its gates are not of the tables' dtype.
    """
    return logits.is_cuda and not torch.is_autocast_enabled("cuda")


class SpecFormerHead(PreTrainedModel):
    """Draft head of one target, whose embedding, final norm and lm_head are not part of it."""

    config_class = SpecFormerConfig
    main_input_name = "hooked_states"
    _no_split_modules = ()

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        hooks, slots = len(config.aux_hidden_state_layer_ids), config.num_draft_slots
        self.scale = config.head_dim**-0.5
        self.hook_norm_weight = nn.Parameter(torch.ones(hooks, size))
        self.fc = nn.Linear(hooks * size, size, bias=False)
        self.context_norm = RMSNorm(size, eps)
        self.context_attn = Projections(config)
        self.positional_norm = RMSNorm(size, eps)
        self.positional_proj = nn.Linear(size, slots * size, bias=True)
        self.slot_width = size  # of what this process computes of a slot; a rank may have a share
        if config.use_bonus_embedding:
            self.bonus_norm = RMSNorm(size, eps)
            self.bonus_proj = nn.Linear(size, size, bias=False)
        first, *more = (SlotLayer(config) for _ in range(config.num_slot_layers))
        # The first layer's parts are the head's own: that is what a file of weights calls them.
        for name, part in first.named_children():
            self.add_module(name, part)
        self.more_slot_layers = nn.ModuleList(more)
        self.slot_layers = (first, *more)  # a tuple: nothing is registered twice
        if config.markov_rank:
            self.markov_embed = nn.Embedding(config.vocab_size, config.markov_rank)
            scored = config.num_scored_tokens
            self.markov_lm_head = nn.Linear(config.markov_rank, scored, bias=False)
        if config.markov_gate:
            self.markov_gate = nn.Linear(size, config.markov_rank, bias=False)
        # The tokens it scores, as target ids in increasing order; a training puts its choice here.
        ids = torch.arange(config.draft_vocab_size) if config.draft_vocab_size else None
        self.draft_token_ids: Tensor | None
        self.register_buffer("draft_token_ids", ids)
        # A buffer, so that vLLM's sleep mode keeps it.
        self._rotary: Tensor | None
        self.register_buffer("_rotary", None, persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        # The head starts as a blend of the hooks alone; the terms added to it fade in.
        faded_in = (getattr(self, name, None) for name in ("markov_lm_head", "markov_gate"))
        if isinstance(module, nn.Linear) and any(module is part for part in faded_in):
            nn.init.zeros_(module.weight)

    @property
    def mixed(self) -> bool:
        """Whether the slots attend to the context too."""
        return self.config.slot_mask == "mixed"

    def rotary(self, device: torch.device) -> Tensor:
        """The rotary table on `device`, float32 [max_position_embeddings + K, D].

        Slots look up to K positions past the last context token, hence the extra rows.
        """
        table = self._rotary
        # `head.to(torch.bfloat16)` rounds buffers, too.
        if table is None or table.device != device or table.dtype != torch.float32:
            config = self.config
            rows = config.max_position_embeddings + config.num_draft_slots
            table = rotary_table(rows, config.head_dim, config.rope_theta).to(device)
            self._rotary = table
        return table

    def combine(self, hooked_states: Sequence[Tensor]) -> Tensor:
        """G hooked states [..., H] -> downsampled context states [..., H] (grouped norm, W_D)."""
        eps = self.config.rms_norm_eps
        return self.fc(grouped_rms_norm(hooked_states, self.hook_norm_weight, eps))

    def context_qkv(self, context: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Context states [..., H] -> rotated query and key, and value, each [..., heads, D].

        Keys and values depend on the target's states at their own position only (never on the bonus
        token), which makes them exact under prefix caching. The engine makes them apart from the
        queries, which only its anchors need, and rotates as it stores: see `Projections`.
        """
        rotation = partial(rotate, table=self.rotary(context.device), positions=positions)
        return self.context_attn(self.context_norm(context), rotation)

    def slots_to_run(self, wanted: int) -> int:
        """Slots a pass must compute to draft `wanted` tokens (see `nested_slots`)."""
        return wanted if self.config.nested_slots else self.config.num_draft_slots

    def expand(
        self, anchor: Tensor, attended: Tensor, bonus_embeds: Tensor | None, num_slots: int
    ) -> Tensor:
        """Finish the context layer and open the slots: [..., H] -> [..., num_slots, H].

        Args:
            anchor: context states at the anchors, [..., H].
            attended: their attention output, [..., query heads, D].
            bonus_embeds: target embedding of the bonus token, [..., H]; ignored by a head that is
                blind to it.
            num_slots: leading slots to open, as `slots_to_run` says.
        """
        hidden = anchor + self.context_attn.output(attended)
        if self.config.use_bonus_embedding:
            assert bonus_embeds is not None
            hidden = hidden + self.bonus_proj(self.bonus_norm(bonus_embeds))
        return self.open_slots(self.positional_norm(hidden), num_slots)

    def open_slots(self, normed: Tensor, num_slots: int) -> Tensor:
        """The positional projection of the leading slots: [..., H] -> [..., num_slots, H]."""
        proj, rows = self.positional_proj, num_slots * self.slot_width
        if rows == proj.out_features:
            slots = proj(normed)
        else:
            # vLLM's own product on a CPU with AMX has made the bias float32.
            slots = F.linear(normed, proj.weight[:rows], proj.bias[:rows].to(normed.dtype))
        return slots.unflatten(-1, (num_slots, -1))

    def run_slots(self, slots: Tensor, anchor_positions: Tensor, attend: Attend) -> Tensor:
        """All slot layers: [..., K, H] -> slot states [..., K, H], before the final norm.

        Args:
            attend: one softmax over the slots and, under the mixed mask, the context too. Its keys
                and values are the same in every layer, those of `context_qkv`: further layers cost
                no cache and no context rows.
        """
        for layer in self.slot_layers:
            attended = attend(*self.slot_qkv(layer, slots, anchor_positions))
            slots = self.finish(layer, slots, attended)
        return slots

    def slot_qkv(
        self, layer: SlotLayer, slots: Tensor, anchor_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [..., K, H] -> a layer's query, key, value [..., K, heads, D].

        Under the mixed mask slot `i` stands at position `t+1+i`, as a decoder that predicts token
        `t+2+i` would; the paper's slots carry no rotary position.
        """
        normed = layer.slot_norm(slots)
        if not self.mixed:
            return layer.slot_attn(normed)
        table = self.rotary(slots.device)
        rotation = partial(rotate_slots, table=table, anchor_positions=anchor_positions)
        return layer.slot_attn(normed, rotation)

    def finish(self, layer: SlotLayer, slots: Tensor, attended: Tensor) -> Tensor:
        """Slots and their attention output in a layer -> the layer's result [..., K, H]."""
        slots = slots + layer.slot_attn.output(attended)
        return slots + layer.ffn(layer.ffn_norm(slots))

    def markov_gates(self, normed: Tensor) -> Tensor | None:
        """What slots make of the tokens before them: states behind the final norm -> factors.

        [..., n, H] -> [..., n, rank] in one pass over all slots; None if the head has no gates. The
        first slot's are 0: the token before it is the bonus token, which it sees by itself.
        """
        if not self.config.markov_gate:
            return None
        return F.pad(self.gate(normed[..., 1:, :]), (0, 0, 1, 0))

    def gate(self, normed: Tensor) -> Tensor:
        """Of slots behind the first: states behind the final norm [..., H] -> [..., rank]."""
        return 1 + self.markov_gate(normed)

    def markov_logits(self, previous_tokens: Tensor, gates: Tensor | None = None) -> Tensor:
        """Low-rank term `(U[x_{i-1}] * g_i) V` of the tokens one slot earlier: [..., N].

        Any token may come earlier; added to are the N tokens that the head scores.

        Args:
            previous_tokens: int64 [...], target ids.
            gates: of the slots, [..., rank], as `markov_gates` says; None: 1.
        """
        earlier = self.markov_embed(previous_tokens)
        if gates is not None:
            earlier = earlier * gates
        return self.markov_scores(earlier)

    def biased(
        self, logits: Tensor, slot: int, previous_tokens: Tensor, gates: Tensor | None
    ) -> Tensor:
        """A slot's logits [..., N] with the term of the tokens before it; gates [..., rank]."""
        if self.config.markov_gate and slot == 0:
            return logits.contiguous()  # its gates are 0
        if is_fused(logits):
            tables = self.markov_embed.weight, self.markov_lm_head.weight
            return markov_bias(logits, previous_tokens, *tables, gates)
        return logits + self.markov_logits(previous_tokens, gates)

    def markov_scores(self, earlier: Tensor, indices: Tensor | None = None) -> Tensor:
        """Entries of the first table, gated or not, [..., rank] -> scores [..., N].

        Or [..., S], of those of the N tokens at `indices`, int64 [S].
        """
        if indices is None:
            return self.markov_lm_head(earlier)
        return F.linear(earlier, self.markov_lm_head.weight[indices])

    def forward(
        self,
        hooked_states: Sequence[Tensor],
        anchors: Tensor,
        bonus_embeds: Tensor | None = None,
        num_slots: int | None = None,
    ) -> Tensor:
        """Slot states at the anchors of whole sequences, densely.

        Args:
            hooked_states: G tensors [batch, T, H] in the order of `aux_hidden_state_layer_ids`.
            anchors: int64 [batch, A], positions in 0..T-1.
            bonus_embeds: [batch, A, H], the embedding of the token after each anchor.
            num_slots: leading slots to run, n; all K when not given.

        Returns:
            [batch, A, n, H], to be passed through the target's final norm and lm_head.
        """
        context = self.combine(hooked_states)
        batch, length = context.shape[:2]
        queries, key, value = self.context_qkv(
            context, torch.arange(length, device=context.device).expand(batch, length)
        )
        rows = torch.arange(batch, device=context.device).unsqueeze(-1)
        anchor, query = context[rows, anchors], queries[rows, anchors]
        visible = self.seen(torch.arange(length, device=context.device), anchors)

        attended = self._attend(query.unsqueeze(2), key, value, visible)
        num_slots = num_slots or self.config.num_draft_slots
        slots = self.expand(anchor, attended.squeeze(2), bonus_embeds, num_slots)
        return self.run_slots(slots, anchors, self._attend_slots(key, value, visible))

    def seen(self, positions: Tensor, anchors: Tensor) -> Tensor:
        """Which context positions [..., T] each anchor [..., A] sees: bool [..., A, T]."""
        positions = positions.unsqueeze(-2)
        behind = anchors.unsqueeze(-1) - positions
        seen = behind >= 0
        window, sinks = self.config.context_window, self.config.context_sinks
        if window:
            seen &= (behind < window) | (positions < sinks)
        return seen

    def _attend_slots(self, key: Tensor, value: Tensor, visible: Tensor) -> Attend:
        """The slots' attention, given the context's K/V and what each anchor sees of it."""
        if self.mixed:
            return lambda query, *own: self._attend(query, key, value, visible, *own)
        return lambda query, *own: self._attend(query, None, None, None, *own)

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        visible: Tensor | None = None,
        own_key: Tensor | None = None,
        own_value: Tensor | None = None,
    ) -> Tensor:
        """One softmax over the visible context and the anchor's own slots.

        query [batch, A, K, heads, D]; key, value [batch, T, K/V heads, D]; visible [batch, A, T];
        own_key, own_value [batch, A, K, K/V heads, D]. Returns [batch, A, K, heads, D].
        """
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        grouped = query.unflatten(3, (-1, groups)) * self.scale
        scores = []
        if key is not None:
            assert visible is not None
            context = torch.einsum("baqhgd,bthd->bhgaqt", grouped, key)
            scores.append(context.masked_fill(~visible[:, None, None, :, None], float("-inf")))
        if own_key is not None:
            scores.append(torch.einsum("baqhgd,bathd->bhgaqt", grouped, own_key))
        weights = torch.cat(scores, dim=-1).float().softmax(-1).to(query.dtype)
        attended, start = torch.zeros_like(grouped), 0
        if value is not None:
            start = value.shape[1]
            attended = torch.einsum("bhgaqt,bthd->baqhgd", weights[..., :start], value)
        if own_value is not None:
            attended = attended + torch.einsum(
                "bhgaqt,bathd->baqhgd", weights[..., start:], own_value
            )
        return attended.flatten(3, 4)

    @torch.no_grad()
    def draft(self, logits: Tensor, bonus_tokens: Tensor, gates: Tensor | None = None) -> Tensor:
        """Greedy drafts, int64 [..., K].

        Args:
            logits: of the slots, [..., K, V or N].
            bonus_tokens: int64 [...].
            gates: of the slots, [..., K, rank], as `markov_gates` says.
        """
        logits = self.scored(logits)
        if not self.config.markov_rank:
            return self.to_tokens(logits.argmax(-1))
        previous, chosen = bonus_tokens, []
        for slot, (own, gate) in enumerate(slot_by_slot(logits, gates)):
            previous = self.to_tokens(self.biased(own, slot, previous, gate).argmax(-1))
            chosen.append(previous)
        return torch.stack(chosen, dim=-1)

    # --- the draft vocabulary: N tokens scored out of V, all of them if the head has none ---

    def scored(self, logits: Tensor) -> Tensor:
        """Logits of the tokens that the head scores, [..., N], out of all or as they are."""
        if self.draft_token_ids is None or logits.shape[-1] == len(self.draft_token_ids):
            return logits
        return logits.index_select(-1, self.draft_token_ids)

    def to_tokens(self, indices: Tensor) -> Tensor:
        """Places in [..., N] -> target ids, int64 [...]."""
        return indices if self.draft_token_ids is None else self.draft_token_ids[indices]

    def to_indices(self, tokens: Tensor, absent: int) -> Tensor:
        """Target ids -> places in [..., N]; `absent` for tokens that are not scored."""
        ids = self.draft_token_ids
        if ids is None:
            return tokens
        places = torch.searchsorted(ids, tokens.contiguous()).clamp(max=len(ids) - 1)
        return torch.where(ids[places] == tokens, places, absent)

    def over_vocabulary(self, values: Tensor, absent: float) -> Tensor:
        """Values of the scored tokens [rows, N] -> of all tokens [rows, V], `absent` elsewhere."""
        if self.draft_token_ids is None:
            return values
        spread = values.new_full((len(values), self.config.vocab_size), absent)
        return spread.index_copy_(1, self.draft_token_ids, values)
