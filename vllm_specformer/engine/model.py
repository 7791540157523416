"""The head as a vLLM model: `SpecFormerHead` over the paged cache, sharing the target's ends.

Registered as architecture `SpecFormerDraftModel`. It owns the head's weights only; embedding, final
norm and logits come from the loaded target by reference. Under tensor parallelism the head is
sharded as the target is (see `sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.attention import DraftAttention
from vllm_specformer.engine.cpu import norms
from vllm_specformer.engine.patches.hooked_states import keep_hooked_states
from vllm_specformer.engine.sharding import HeadShard
from vllm_specformer.engine.speculative_config import tree_settings
from vllm_specformer.engine.target_logits import CopiedRows, logits_of_some, without_adapters
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.pairing import HeadWeightError, check_draft_tokens
from vllm_specformer.target.parts import NORM_NAMES, find_part

# What decoders call their embedding, those of vLLM and those of Transformers that it runs.
EMBEDDING_NAMES = ("embed_tokens", "embedding", "embeddings", "embed_in", "wte")


def embedding_table(decoder: Any) -> nn.Module:
    """The vocabulary's table under whatever is put around it.

    A LoRA wrapper (the head drafts without adapters, lossless all the same), or a scale.

    Raises:
        AttributeError: the decoder has no such table.
    """
    embedding = find_part(decoder, EMBEDDING_NAMES)
    tables = (m for m in embedding.modules() if isinstance(m, VocabParallelEmbedding))
    return next(tables, embedding)


def _normed(norm: nn.Module, states: Tensor) -> Tensor:
    """The norm's output alone; some families' norms (Cohere) return a residual with it."""
    out = norm(states)
    return out[0] if isinstance(out, tuple) else out


def keep_through_sleep(vllm_config: VllmConfig) -> None:
    """Have vLLM keep the head on the host through sleep of level 2.

    That level discards all weights. The target's are loaded again after it, no drafter's are.
    """
    patterns = vllm_config.model_config.sleep_preserve_parameter_names
    if "draft.*" not in patterns:
        patterns.append("draft.*")


def refuse_other_weights() -> NoReturn:
    """Raises HeadWeightError: the head is being served."""
    raise HeadWeightError(
        "draft weights: a SpecFormer head that is being served cannot be given others",
        "leave the draft model out of the update, or start the server with the new head",
    )


class SpecFormerDraftModel(nn.Module):
    """One draft pass: context states -> K tokens per request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative = vllm_config.speculative_config
        self.config: SpecFormerConfig = head_config(speculative.draft_model_config.hf_config)
        # RoPE covers what is served, whatever length the head was made for: a table for ten million
        # positions would take gigabytes.
        self.config.max_position_embeddings = vllm_config.model_config.max_model_len
        self.head = SpecFormerHead(self.config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        wanted = speculative.draft_parallel_config.tensor_parallel_size
        self.shard = HeadShard(self.config, ranks, wanted)
        self.num_slots = self.config.num_draft_slots
        tree = tree_settings(speculative)
        self.num_served = speculative.num_speculative_tokens if tree is None else tree.slots
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.attn = DraftAttention(
            first_layer=layers,
            num_kv_heads=self.shard.kv_heads,
            head_size=self.config.head_dim,
            scale=self.head.scale,
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            block_widths=range(1, self.num_slots + 1),
            window=self.config.context_window,
            sinks=self.config.context_sinks,
        )
        self._target: dict[str, Callable[..., Tensor]] = {}
        self._hook_norm: norms.HookNorm | None = None
        self._is_prepared = False

    def bind_target(self, target: Any) -> None:
        """Share the target's embedding table, final norm and logits, by reference, unregistered.

        The target's layers get copies of its hooked states from now on.

        Raises:
            ValueError: the target's decoder has none of the names that decoders give them.
        """
        if not self._is_prepared:  # `--load-format dummy` loads nothing
            self._prepare_for_serving()
        language = target.get_language_model() if hasattr(target, "get_language_model") else target
        decoder = getattr(language, "model", language)
        try:
            embedding, norm = embedding_table(decoder), find_part(decoder, NORM_NAMES)
        except AttributeError as error:
            raise ValueError(
                f"target {type(target).__name__}: {error}; SpecFormer cannot share it, serve this "
                "target without speculation"
            ) from None
        config = self.config
        keep_hooked_states(decoder, config.aux_hidden_state_layer_ids, config.target_num_layers)
        language = without_adapters(language)
        logits = getattr(language, "compute_logits", target.compute_logits)
        token_ids, like = self.head.draft_token_ids, self.head.context_norm.weight
        if token_ids is not None:
            logits = logits_of_some(language, embedding, logits, token_ids, like)
            if isinstance(logits, CopiedRows):
                self.copied_rows = logits  # vLLM's sleep mode keeps buffers of registered modules
        self._target = {"embed": embedding, "norm": partial(_normed, norm), "logits": logits}
        self.head.rotary(self.head.fc.weight.device)

    def use_cpu_norms(self) -> None:
        """From now on norms are vLLM's CPU operation, for a runner without our Triton kernels."""
        self._hook_norm = norms.HookNorm(self.head)
        norms.use_for(self.head)

    def combine_hidden_states(self, hooked_states: Sequence[Tensor]) -> Tensor:
        """G hooked states [T, H] -> context states [T, H]."""
        if self._hook_norm is None:
            return self.head.combine(hooked_states)
        context: Tensor = self.head.fc(self._hook_norm(hooked_states))
        return context

    def normalise(self, context: Tensor) -> Tensor:
        """Context states [..., H] as `store_context_and_query` takes them."""
        return self.head.context_norm(context)

    def store_context_and_query(
        self,
        normed: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        normed_anchors: Tensor | None = None,
        anchor_positions: Tensor | None = None,
    ) -> Tensor | None:
        """Write the K/V of normalised context states [T, H] at `positions` [T] to their slots [T].

        Args:
            normed_anchors: normalised context states [R, H] whose queries are wanted too.
            anchor_positions: int64 [R], given with them.

        Returns:
            The anchors' queries [R, heads, D], for the draft pass; None if there are none.
        """
        projections = self.head.context_attn
        return self.attn.store(
            *projections.key_value(normed),
            slot_mapping,
            self.head.rotary(normed.device),
            positions,
            None if normed_anchors is None else projections.query(normed_anchors),
            anchor_positions,
        )

    def forward(
        self,
        anchors: Tensor,
        queries: Tensor,
        positions: Tensor,
        context_lens: Tensor,
        bonus_tokens: Tensor,
        block_table: Tensor | None,
        num_tokens: int,
    ) -> Tensor:
        """The draft pass.

        Args:
            anchors: context states [R, H] of each request's last accepted token.
            queries: theirs, [R, heads, D], as `store_context_and_query` made them.
            positions: int64 [R], their positions; the K/V up to them are in the cache.
            context_lens: int64 [R], `positions + 1`.
            bonus_tokens: integer [R], the tokens the target has just sampled.
            block_table: int32 [R, blocks]; None only while no cache is bound.
            num_tokens: tokens to draft, n.

        Returns:
            Slot states [R, n, H] after the target's final norm.
        """
        head = self.head
        num_slots = head.slots_to_run(num_tokens)
        context = self.attn.begin(block_table, context_lens)
        attended = context.anchors(queries)
        bonus = self._target["embed"](bonus_tokens) if self.config.use_bonus_embedding else None
        slots = head.expand(anchors, attended, bonus, num_slots)
        slots = head.run_slots(slots, positions, partial(context.slots, mixed=head.mixed))
        slots = slots[:, :num_tokens]
        return self._target["norm"](slots.flatten(0, 1)).view_as(slots)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Slot states [rows, H] -> the target's logits [rows, V], or of a draft vocabulary's N."""
        return self._target["logits"](hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the checkpoint into the head.

        Raises:
            HeadWeightError: a tensor is unknown, missing, misshapen or not finite, the draft
                vocabulary is none of the target's, or weights have been loaded before: they are
                cut and packed by then.
        """
        if self._is_prepared:
            refuse_other_weights()
        parameters = self.head.state_dict()
        loaded = set()
        for name, tensor in weights:
            if name not in parameters:
                raise HeadWeightError(f"head weight {name!r} is unknown to this configuration")
            if tensor.shape != parameters[name].shape:
                raise HeadWeightError(
                    f"head weight {name!r} has shape {list(tensor.shape)}, the configuration "
                    f"expects {list(parameters[name].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise HeadWeightError(f"head weight {name!r} holds NaN or infinite values")
            if name == "draft_token_ids":
                check_draft_tokens(tensor, self.config, "")
            parameters[name].copy_(tensor)
            loaded.add(f"head.{name}")
        absent = sorted(set(parameters) - {n.removeprefix("head.") for n in loaded})
        if absent:
            raise HeadWeightError(f"head weights are missing: {', '.join(absent)}")
        self._prepare_for_serving()
        return loaded

    def _prepare_for_serving(self) -> None:
        """Drop slots that are never drafted and what other ranks hold; on a CPU, pack the rest."""
        self._is_prepared = True
        if self.config.nested_slots:
            proj = self.head.positional_proj
            rows = self.num_served * self.config.hidden_size
            proj.weight = nn.Parameter(proj.weight[:rows].clone(), requires_grad=False)
            proj.bias = nn.Parameter(proj.bias[:rows].clone(), requires_grad=False)
            proj.out_features = rows
        self.shard.cut(self.head)
        if self.head.fc.weight.device.type == "cpu":
            self._pack()

    def _pack(self) -> None:
        attention = self.head.context_attn
        for module in self.head.modules():
            if isinstance(module, nn.Linear) and module is not attention.qkv_proj:
                module.forward = _packed(module)  # type: ignore[method-assign]
        # Apart: many rows want keys and values, few of them queries.
        query, key_value = (_linear(weight) for weight in attention.split_weight())
        attention.query_linear = _packed(query)  # type: ignore[method-assign]
        attention.key_value_linear = _packed(key_value)  # type: ignore[method-assign]


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _packed(module: nn.Linear) -> partial[Tensor]:
    dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    return partial(_packed_forward, module)


def _packed_forward(module: Any, x: Tensor) -> Tensor:
    return module.cpu_linear(x, module.weight, module.bias)


def head_config(hf_config: Any) -> SpecFormerConfig:
    """The head's own configuration out of the one vLLM derived from it (see `patches`)."""
    return SpecFormerConfig(**hf_config.specformer)
