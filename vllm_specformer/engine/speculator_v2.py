"""The SpecFormer speculator on vLLM's V2 model runner (the default on GPUs).

It is a `DFlashSpeculator` only so that `init_speculator` builds it; apart from the set-up every
method a step goes through is here or, behind the head's pass, in `draws/sampling_v2.py`. The step
is split where CUDA graphs need it to be: `_stage` copies what varies into buffers whose addresses
never change, without waiting for the device; `_draft` reads nothing else, so it can be captured.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from specformer_kernels.draft_inputs import DraftBuffers, StepInputs, draft_inputs
from specformer_kernels.markov_bias import FEW_ROWS
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.spec_decode.dflash.cudagraph import DFlashCudaGraphManager
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_specformer.engine.checks import (
    check_batch_invariance,
    check_patches,
    check_target_class,
    check_v2_adapters,
)
from vllm_specformer.engine.confidence.estimator import of_head
from vllm_specformer.engine.draws.batch_v2 import BestRows
from vllm_specformer.engine.draws.sampling_v2 import DraftSampling
from vllm_specformer.engine.head_pages import check_cache
from vllm_specformer.engine.kv_transfer import moving_pages
from vllm_specformer.engine.metrics import AcceptanceMonitor, DraftClock, timed
from vllm_specformer.engine.model import keep_through_sleep
from vllm_specformer.engine.speculative_config import (
    ADAPTIVE,
    confidence_ranges,
    verifies_coupled,
)


def drafts_by_batch_size(vllm_config: VllmConfig) -> list[int]:
    """Tokens the scheduler asks for, by the number of requests in a step, from 0 to the most."""
    speculative = vllm_config.speculative_config
    most = vllm_config.scheduler_config.max_num_seqs
    if not speculative.uses_dynamic_speculative_decoding():
        return [speculative.num_speculative_tokens] * (most + 1)
    drafts: list[int] = build_dynamic_sd_schedule_lookup(
        speculative.num_speculative_tokens_per_batch_size,
        vllm_max_batch_size=most,
        vllm_num_speculative_tokens=speculative.num_speculative_tokens,
    )
    return drafts


def _without_draft_logits(vllm_config: VllmConfig) -> VllmConfig:
    """The config as the base class takes it without allocating logits [requests, K, V], GiBs."""
    config = copy(vllm_config)
    config.speculative_config = copy(vllm_config.speculative_config)
    config.speculative_config.draft_sample_method = "greedy"
    return config


class SpecFormerSpeculator(DraftSampling):
    _speculator_name = "SpecFormer"
    # What `_kept_rows` gives for the rows is a kernel's variant: a dummy step runs the same.
    _dummy_rows: Tensor | None = None
    acceptance_estimator: Any

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        check_patches()
        check_target_class(vllm_config)
        check_cache(vllm_config)
        check_batch_invariance(vllm_config.speculative_config)
        check_v2_adapters(vllm_config.lora_config)
        keep_through_sleep(vllm_config)
        # Before the base class, which asks for the sizes of graphs in 0.33.
        self._scheduled_drafts = drafts_by_batch_size(vllm_config)
        self._graph_drafts: dict[int, int] = {}
        self._is_adaptive = bool(getattr(vllm_config.speculative_config, ADAPTIVE, False))
        # Sampled drafts that share the target's noise agree with it far more often, and coupled
        # verification asks for no draft probabilities: the cache of draft logits is not needed.
        speculative = vllm_config.speculative_config
        self.draws_with_target = (
            verifies_coupled(speculative) and speculative.draft_sample_method == "probabilistic"
        )
        super().__init__(
            _without_draft_logits(vllm_config) if self.draws_with_target else vllm_config, device
        )
        self.speculative_config = self.vllm_config.speculative_config = speculative
        self._aux_staging = None  # a buffer of DFlash's own graph (0.33) that we never read
        # Among sampled requests with drawn drafts, those that want the best ones all the same.
        self.best_rows = BestRows(self.max_num_reqs, device)
        # One query row per request: its last accepted token.
        self.num_query_per_req = 1
        self.monitor = AcceptanceMonitor(device)
        self.clock = DraftClock(device, vllm_config.parallel_config)
        self.inputs = self._input_buffers()
        self._block_table: Tensor | None = None

    def _input_buffers(self) -> DraftBuffers:
        """What a draft step reads beside the hidden states: vLLM's buffers and our own, inert."""
        requests = self.max_num_reqs
        anchor_rows, anchor_positions, bonus_tokens = torch.zeros(
            (3, requests), dtype=torch.int64, device=self.device
        )
        return DraftBuffers(
            context_positions=self.context_positions,
            slot_mapping=torch.full(
                (self.max_num_tokens,), PAD_SLOT_ID, dtype=torch.int64, device=self.device
            ),
            anchor_rows=anchor_rows,
            anchor_positions=anchor_positions,
            context_lens=torch.ones(requests, dtype=torch.int64, device=self.device),
            bonus_tokens=bonus_tokens,
            sample_pos=self.sample_pos,
            sample_idx_mapping=self.sample_idx_mapping,
            idx_mapping=self.idx_mapping,
            temperature=self.temperature,
            seeds=self.seeds,
        )

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> nn.Module:
        from vllm.compilation.backends import set_model_tag
        from vllm.model_executor.model_loader import get_model
        from vllm.model_executor.model_loader.utils import get_draft_load_config

        with set_model_tag("specformer_head"):
            model = get_model(
                vllm_config=self.vllm_config,
                model_config=self.draft_model_config,
                load_config=get_draft_load_config(self.vllm_config),
            )
        model.bind_target(target_model)
        return model

    def load_model(self, target_model: nn.Module) -> None:
        super().load_model(target_model)
        if self.acceptance_estimator is not None:
            self.acceptance_estimator = of_head(
                self.model.config,
                self.acceptance_estimator,
                self.max_num_reqs,
                confidence_ranges(self.speculative_config) is not None,
            )

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        DraftModelSpeculator.set_attn(self, *args, **kwargs)
        layer = self.model.attn.layer_name
        groups = self.kv_cache_config.kv_cache_groups
        self.group = next(i for i, group in enumerate(groups) if layer in group.layer_names)
        self._block_table = self.block_tables.input_block_tables[self.group]
        self.model.attn.table_block_size = groups[self.group].kv_cache_spec.block_size

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Full graphs for whole batches, or none: the step has no part worth a piecewise graph."""
        self._graph_drafts.clear()  # the sizes are final only now
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        self.query_cudagraph_manager = DFlashCudaGraphManager(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE,
            decode_query_len=1,
        )

    def capture(self) -> None:
        """Capture the step for every batch size, with all rows inert; vLLM skips it when eager."""
        self.warm_up()
        self.query_cudagraph_manager.capture(
            self._generate_draft,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            self.max_model_len,
            causal=True,
            prepare_forward=self._prepare_graph_forward,
            progress_bar_desc="Capturing specformer CUDA graphs",
        )
        self.end_warm_up()

    def end_warm_up(self) -> None:
        """Forget what vLLM's warm-up has drafted."""
        self.monitor.reset()
        self.clock.reset()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile every kernel that serving may launch outside of a graph.

        Drafts once for every number of drafts, and stores without drafting, with inert rows. The
        Markov term has another variant for more rows.
        """
        self._make_inert()
        self._store_context_and_query(0, 1)
        for wanted in sorted({*self._scheduled_drafts, self.num_speculative_steps} - {0}):
            self._draft(1, 1, wanted)
        if self.model.config.markov_rank and self.max_num_reqs > FEW_ROWS:
            self._draft(FEW_ROWS + 1, 1, self.num_speculative_steps)

    def _prepare_graph_forward(self, num_reqs: int, attn_metadata: Any = None) -> None:
        """Nothing: the draft pass stores the context as it rotates its queries."""

    def _num_graph_drafts(self, num_reqs: int) -> int:
        """Tokens the graph of a batch size drafts: the most that a batch it serves is asked for."""
        if num_reqs not in self._graph_drafts:  # asked for in every replayed step
            sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or ()
            smaller = max((size for size in sizes if size < num_reqs), default=0)
            served = self._scheduled_drafts[smaller + 1 : num_reqs + 1]
            self._graph_drafts[num_reqs] = max([1, *served])
        return self._graph_drafts[num_reqs]

    def _num_graph_context_tokens(self, num_reqs: int) -> int:
        """Context rows a captured step stores: one whole verification per request."""
        return min(num_reqs * (self._num_graph_drafts(num_reqs) + 1), self.max_num_tokens)

    def _store_context_and_query(self, start: int, end: int, *anchors: Tensor) -> Tensor | None:
        """Store rows of the buffers; with normalised anchors and their positions, their queries."""
        return self.model.store_context_and_query(
            self.model.normalise(self.hidden_states[start:end]),
            self.context_positions[start:end],
            self.inputs.slot_mapping[start:end],
            *anchors,
        )

    def _make_inert(self) -> None:
        """No row writes K/V, draws or caches logits."""
        inputs = self.inputs
        for tensor in (inputs.slot_mapping, inputs.sample_idx_mapping, inputs.idx_mapping):
            tensor.fill_(PAD_SLOT_ID)
        inputs.context_lens.fill_(1)
        for tensor in (inputs.anchor_rows, inputs.anchor_positions, inputs.bonus_tokens):
            tensor.zero_()
        inputs.sample_pos.zero_()

    def _stage(
        self,
        batch: Any,
        slot_mappings: dict[str, Tensor] | None,
        aux_hidden_states: list[Tensor],
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dummy_run: bool,
    ) -> None:
        """Copy the step's inputs into the buffers the captured part reads; rows past them inert."""
        requests, tokens = batch.num_reqs, batch.num_tokens
        hooks = [state[:tokens] for state in aux_hidden_states]
        self.hidden_states[:tokens].copy_(self.model.combine_hidden_states(hooks))
        last_rows = self._dummy_rows
        if dummy_run:
            # Its rows name state rows and pages of others, so none of them may act.
            slots, requests, tokens = batch.positions, 0, 0
        else:
            assert slot_mappings is not None
            slots, last_rows = self._kept_rows(batch, slot_mappings, num_rejected)
        step = StepInputs(
            query_start_loc=batch.query_start_loc,
            positions=batch.positions,
            slot_mapping=slots,
            idx_mapping=batch.idx_mapping,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            last_sampled=last_sampled.flatten(),
            next_prefill_tokens=next_prefill_tokens.flatten(),
            temperature=temperature,
            seeds=seeds,
            last_rows=last_rows,
        )
        draft_inputs(step, self.inputs, requests, tokens)

    def _kept_rows(
        self, batch: Any, slot_mappings: dict[str, Tensor], num_rejected: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The slot of each row in the head's cache, and each request's last accepted row.

        None for the rows: that many before its last as drafts were refused.
        """
        return slot_mappings[self.model.attn.layer_name], None

    @moving_pages
    @timed
    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """Store the step's context K/V and draft; arguments and shapes as vLLM's base class.

        Returns:
            int64 [R, K]. When fewer drafts are wanted, or none and the K/V are stored all the same,
            the rest of the rows holds earlier drafts, which the runner ignores (it copies whole
            rows).
        """
        assert aux_hidden_states, "the target returned no auxiliary hidden states"
        requests, tokens = input_batch.num_reqs, input_batch.num_tokens
        if not dummy_run:
            self._observe(input_batch, num_rejected[:requests])
        self._stage(
            input_batch,
            slot_mappings,
            aux_hidden_states,
            num_sampled,
            num_rejected,
            last_sampled,
            next_prefill_tokens,
            temperature,
            seeds,
            dummy_run,
        )
        if num_speculative_tokens == 0:
            self._store_context_and_query(0, tokens)
            return self.draft_tokens[:requests]
        wanted = num_speculative_tokens or self.num_speculative_steps
        self._best = None
        if self.draft_logits is not None and not dummy_run:
            self._best = self.best_rows.of(
                input_batch.idx_mapping_np[:requests], input_batch.idx_mapping[:requests]
            )
        if dummy_run and skip_attn_for_dummy_run:
            self._draft(requests, tokens, wanted)
            return self.draft_tokens[:requests]
        if dummy_run and dp_sync_state is not None:
            # A dummy batch of one rank may exceed what the ranks agreed on.
            requests = min(requests, dp_sync_state.num_reqs)
        self._run(requests, tokens, wanted, dp_sync_state, is_profile)
        return self.draft_tokens[:requests]

    def admit_request(self, state: int, params: Any, sampler: Any) -> None:
        """A state row's new tenant, with vLLM's sampling parameters; see `patches/new_requests`."""
        self.best_rows.add_request(state, params)

    def _observe(self, batch: Any, num_rejected: Tensor) -> None:
        self.monitor.observe(batch.num_draft_tokens, num_rejected)

    def _run(
        self, requests: int, tokens: int, wanted: int, dp_sync_state: Any, need_eager: bool
    ) -> None:
        """Replay the captured step where one fits the batch, else run it eagerly.

        Data parallel ranks agree on the largest batch among them, whose graph may draft fewer
        tokens than this rank is asked for. A graph draws for every sampled request.
        """
        sync, num_rows = (
            self._build_uniform_batch_dp_sync(dp_sync_state, requests, 1)
            if dp_sync_state is not None
            else (None, requests)
        )
        batch_desc, _ = dispatch_cg_and_sync_dp(
            self.query_cudagraph_manager,
            requests,
            num_rows,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=need_eager,
            dp_sync_state=sync,
        )
        replays = batch_desc.cg_mode == CUDAGraphMode.FULL and self._best is None
        if not replays or self._num_graph_drafts(batch_desc.num_reqs) < wanted:
            self._draft(requests, tokens, wanted)
            return
        # The graph stores the first rows; what a prefill brings beyond them is stored before it.
        captured = self._num_graph_context_tokens(batch_desc.num_reqs)
        if tokens > captured:
            self._store_context_and_query(captured, tokens)
        self.query_cudagraph_manager.run_fullgraph(batch_desc)

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: Any = None,
        slot_mappings: Any = None,
        num_tokens_across_dp: Any = None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    ) -> None:
        """What a graph captures; the parameters are those its manager passes."""
        context = self._num_graph_context_tokens(num_reqs)
        self._draft(num_reqs, context, self._num_graph_drafts(num_reqs))

    def _draft(self, num_reqs: int, num_context: int, wanted: int) -> None:
        """Store the first rows of the buffers and draft from them.

        Fills `draft_tokens[:num_reqs, :wanted]`. Rows past `num_context` must be in the cache
        already.
        """
        logits, gates = self._slot_logits(num_reqs, num_context, wanted)
        if self.model.config.markov_rank:
            bonus = self.inputs.bonus_tokens[:num_reqs]
            self._sample_in_order(logits, gates, bonus)
        else:
            logits = logits.flatten(0, 1)
            self._predict_acceptance(logits, num_reqs, slice(0, wanted))
            sampled = self._sample(logits, num_reqs, slice(0, wanted))
            self.draft_tokens[:num_reqs, :wanted] = sampled.view(num_reqs, -1)

    def _slot_logits(
        self, num_reqs: int, num_context: int, slots: int
    ) -> tuple[Tensor, Tensor | None]:
        """Store the first rows of the buffers and run the head.

        Returns:
            Logits [num_reqs, slots, V or N], and gates of the Markov term [num_reqs, slots, rank].
        """
        bonus = self.inputs.bonus_tokens[:num_reqs]
        positions = self.inputs.anchor_positions[:num_reqs]
        anchors = self.hidden_states[self.inputs.anchor_rows[:num_reqs]]
        lens = self.inputs.context_lens[:num_reqs]
        normed = self.model.normalise(anchors)
        queries = self._store_context_and_query(0, num_context, normed, positions)
        table = None if self._block_table is None else self._block_table[:num_reqs]
        states = self.model(anchors, queries, positions, lens, bonus, table, slots)
        logits = self.model.compute_logits(states.flatten(0, 1))
        return logits.view(num_reqs, slots, -1), self.model.head.markov_gates(states)
