"""The head as a vLLM model: `SpecFormerHead` over the paged cache, sharing the target's ends.

Registered as architecture `SpecFormerDraftModel`. It owns the head's weights only; embedding, final
norm and logits come from the loaded target by reference. Under tensor parallelism every rank runs
the whole head (one layer; its weights are about one decoder layer's), and the target's own
vocabulary-parallel `compute_logits` does the large GEMM sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.attention import DraftAttention
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.weights import HeadWeightError


def unwrapped(layer: Any) -> Any:
    """The layer under a LoRA wrapper: the head drafts without adapters (lossless all the same)."""
    return getattr(layer, "base_layer", layer)


class SpecFormerDraftModel(nn.Module):
    """One draft pass: context states -> K tokens per request."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative = vllm_config.speculative_config
        self.config: SpecFormerConfig = head_config(speculative.draft_model_config.hf_config)
        # RoPE must cover what is served, whatever length the head was trained at.
        served = vllm_config.model_config.max_model_len
        self.config.max_position_embeddings = max(self.config.max_position_embeddings, served)
        self.head = SpecFormerHead(self.config)
        self.num_slots = self.config.num_draft_slots
        self.num_served = speculative.num_speculative_tokens
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.attn = DraftAttention(
            prefix=f"model.layers.{layers}.self_attn.attn",
            num_kv_heads=self.config.num_key_value_heads,
            head_size=self.config.head_dim,
            scale=self.head.scale,
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            block_widths=range(1, self.num_slots + 1),
        )
        self._target: dict[str, Callable[..., Tensor]] = {}

    def bind_target(self, target: Any) -> None:
        """Share the target's embedding, final norm and logits, by reference and unregistered.

        Raises:
            ValueError: the target has no `embed_tokens` and `norm` where decoders keep them.
        """
        language = target.get_language_model() if hasattr(target, "get_language_model") else target
        decoder = getattr(language, "model", language)
        missing = [n for n in ("embed_tokens", "norm") if not hasattr(decoder, n)]
        if missing:
            raise ValueError(
                f"target {type(target).__name__} has no {', '.join(missing)} in its decoder; "
                "SpecFormer cannot share them, serve this target without speculation"
            )
        self._target = {
            "embed": unwrapped(decoder.embed_tokens),
            "norm": decoder.norm,
            "logits": language.compute_logits,
        }
        self.head.rotary(self.head.fc.weight.device)

    def combine_hidden_states(self, hooked_states: Sequence[Tensor]) -> Tensor:
        """G hooked states [T, H] -> context states [T, H]."""
        return self.head.combine(hooked_states)

    def store_context(
        self, context: Tensor, positions: Tensor, slot_mapping: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the K/V of context states [T, H] at `positions` [T] to `slot_mapping` [T].

        Returns:
            The rows' queries, keys and values, for the draft pass to take its anchors from.
        """
        query, key, value = self.head.context_qkv(context, positions)
        self.attn.store(key, value, slot_mapping)
        return query, key, value

    def forward(
        self,
        anchors: Tensor,
        anchor_qkv: tuple[Tensor, Tensor, Tensor],
        positions: Tensor,
        bonus_tokens: Tensor,
        block_table: Tensor | None,
        num_tokens: int,
    ) -> Tensor:
        """The draft pass.

        Args:
            anchors: context states [R, H] of each request's last accepted token.
            anchor_qkv: their query, key and value [R, heads, D], as `store_context` made them.
            positions: int64 [R], their positions; the K/V before them are in the cache.
            bonus_tokens: integer [R], the tokens the target has just sampled.
            block_table: int32 [R, blocks]; None only while no cache is bound.
            num_tokens: tokens to draft, n.

        Returns:
            Slot states [R, n, H] after the target's final norm.
        """
        head = self.head
        num_slots = head.slots_to_run(num_tokens)
        context = self.attn.begin(block_table, positions + 1, num_slots)
        attended = context.anchors(*anchor_qkv)
        bonus = self._target["embed"](bonus_tokens) if self.config.use_bonus_embedding else None
        slots = head.expand(anchors, attended, bonus, num_slots)
        attended = context.slots(*head.slot_qkv(slots, positions), head.mixed)
        slots = head.finish(slots, attended)[:, :num_tokens]
        return self._target["norm"](slots.flatten(0, 1)).view_as(slots)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Slot states [N, H] -> the target's logits [N, V]."""
        return self._target["logits"](hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the checkpoint into the head.

        Raises:
            HeadWeightError: a tensor is unknown, missing, misshapen or not finite.
        """
        parameters = dict(self.head.named_parameters())
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
            parameters[name].data.copy_(tensor)
            loaded.add(f"head.{name}")
        absent = sorted(set(parameters) - {n.removeprefix("head.") for n in loaded})
        if absent:
            raise HeadWeightError(f"head weights are missing: {', '.join(absent)}")
        self._prepare_for_serving()
        return loaded

    def _prepare_for_serving(self) -> None:
        """Drop slots that are never drafted; on a CPU, pack the matrices as vLLM packs its own."""
        if self.config.nested_slots:
            proj = self.head.positional_proj
            rows = self.num_served * self.config.hidden_size
            proj.weight = nn.Parameter(proj.weight[:rows].clone(), requires_grad=False)
            proj.bias = nn.Parameter(proj.bias[:rows].clone(), requires_grad=False)
            proj.out_features = rows
        for module in self.head.modules():
            if isinstance(module, nn.Linear) and module.weight.device.type == "cpu":
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
                module.forward = partial(_packed_forward, module)  # type: ignore[method-assign]


def _packed_forward(module: Any, x: Tensor) -> Tensor:
    return module.cpu_linear(x, module.weight, module.bias)


def head_config(hf_config: Any) -> SpecFormerConfig:
    """The head's own configuration out of the one vLLM derived from it (see `patches`)."""
    return SpecFormerConfig(**hf_config.specformer)
