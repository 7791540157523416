"""The SpecFormer speculator that drafts trees (V2 model runner)."""

from __future__ import annotations

from typing import Any

import torch
from specformer_kernels.place_trees import place_trees
from specformer_kernels.tree_paths import TreePaths, tree_paths
from specformer_kernels.verify import follow
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from vllm_specformer.candidates import draft_tree
from vllm_specformer.engine.candidates.attention import TreeAttention
from vllm_specformer.engine.candidates.chains import depends_on_rows_before, has_other_processors
from vllm_specformer.engine.candidates.checks import check_layers, check_trees
from vllm_specformer.engine.candidates.kv_layers import TargetLayers
from vllm_specformer.engine.candidates.trees import CandidateTrees
from vllm_specformer.engine.speculative_config import tree_settings
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


class CandidateSpeculator(SpecFormerSpeculator):
    """Drafts `num_speculative_steps` nodes of a tree, as deep as the head has slots to serve."""

    _speculator_name = "SpecFormer trees"

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        check_trees(vllm_config)
        super().__init__(vllm_config, device)
        settings = tree_settings(vllm_config.speculative_config)
        assert settings is not None
        self.num_slots = settings.slots
        self.trees = CandidateTrees(
            self.max_num_reqs, self.max_num_tokens, self.num_speculative_steps, device
        )
        self._layers: TargetLayers | None = None
        self._dummy_rows = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if isinstance(layer, AttentionLayerBase)]
        check_layers(layers, self.vllm_config)
        for layer in layers:
            assert isinstance(layer.impl, TreeAttention)
            layer.impl.trees = self.trees
        return super().load_draft_model(target_model, target_attn_layer_names)

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn(*args, **kwargs)
        self._layers = TargetLayers(self.vllm_config, self.kv_cache_config.kv_cache_groups)

    def admit_request(self, state: int, params: Any, sampler: Any) -> None:
        super().admit_request(state, params, sampler)
        needs_chain = depends_on_rows_before(params) or has_other_processors(sampler)
        self.trees.admit(state, needs_chain)

    @torch.inference_mode()
    def warm_up(self) -> None:
        super().warm_up()
        assert self._layers is not None
        table, device = self.trees.table, self.device
        # One row of one request, in the state row that is nobody's.
        starts = torch.arange(2, dtype=torch.int32, device=device)
        state = torch.full((1,), self.max_num_reqs, dtype=torch.int64, device=device)
        one, nothing = torch.ones_like(starts[:1]), torch.full_like(state, PAD_SLOT_ID)
        mask, lens = self.trees.row_mask, self.trees.context_lens
        place_trees(table, starts, starts, state, one, torch.zeros_like(state), mask, lens)
        paths = tree_paths(table, starts, state, torch.zeros_like(one), nothing)
        follow(nothing, nothing, starts, self.num_speculative_steps + 1, starts[:1])
        for layers in self._layers.alike():
            layers.move(paths.source_slots, paths.target_slots)
            pages = self.block_tables.input_block_tables[layers.group]
            layers.impl.warm_up(layers.caches[0], pages, starts, self.dtype)

    def _kept_rows(
        self, batch: Any, slot_mappings: dict[str, Tensor], num_rejected: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Move the accepted paths' K and V of the target; where the head's belong and begin."""
        assert self._layers is not None

        def follow_in(layer: str) -> TreePaths:
            return tree_paths(
                self.trees.table,
                batch.query_start_loc,
                batch.idx_mapping,
                num_rejected[: batch.num_reqs],
                slot_mappings[layer],
            )

        # Layers of one KV-cache group have the same slots, and the head's are in a target's group.
        by_group: dict[int, TreePaths] = {self.group: follow_in(self.model.attn.layer_name)}
        for layers in self._layers.alike():
            if layers.group not in by_group:
                by_group[layers.group] = follow_in(layers.name)
            layers.move(*by_group[layers.group][:2])
        self.trees.forget_batch()
        own = by_group[self.group]
        return own.row_slots, own.last_rows

    def _observe(self, batch: Any, num_rejected: Tensor) -> None:
        """Judge acceptance by a tree's depth: most of its nodes are alternatives."""
        drafts = batch.num_draft_tokens_per_req
        if drafts is None or not batch.num_draft_tokens:
            return
        deepest = drafts.clip(max=self.num_slots)
        surplus = int((drafts - deepest).sum())
        self.monitor.observe(int(deepest.sum()), num_rejected.sum() - surplus)

    def _draft(self, num_reqs: int, num_context: int, wanted: int) -> None:
        slots = min(wanted, self.num_slots)
        logits, gates = self._slot_logits(num_reqs, num_context, slots)
        states = self.inputs.idx_mapping[:num_reqs]  # -1 in rows that pad a graph
        positions = self.inputs.anchor_positions[:num_reqs]
        tree = draft_tree(
            self.model.head,
            logits,
            self.inputs.bonus_tokens[:num_reqs],
            wanted,
            gates=gates,
            temperature=self.temperature[states],
            seeds=self.seeds[states],
            positions=positions,
            chains=self.trees.needs_chain[states],
        )
        self.trees.keep(states, positions + 1, tree)
        # Nodes that are none are fed to the target as any token; nothing is accepted there.
        self.draft_tokens[:num_reqs, :wanted] = tree.tokens[:, 1:].clamp(min=0)
