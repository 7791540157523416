"""The SpecFormer proposer on vLLM's V1 model runner (native on CPU).

It is a `DFlashProposer` because V1's runner recognises proposers by class; of DFlash it keeps the
set-up only. A step is: combine the hooked states, store their K/V at the target's own slots, run
one draft pass from each request's last accepted token, sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_specformer.engine.checks import (
    check_batch_invariance,
    check_patches,
    check_target_class,
    check_v1_verification,
)
from vllm_specformer.engine.confidence.cut_v1 import ConfidenceCut
from vllm_specformer.engine.draws.batch_v1 import DrawnBatch
from vllm_specformer.engine.head_pages import check_cache
from vllm_specformer.engine.kv_transfer import moving_pages
from vllm_specformer.engine.metrics import AcceptanceMonitor, DraftClock, timed
from vllm_specformer.engine.model import keep_through_sleep
from vllm_specformer.engine.patches.late_store import DeferredRows, has_time_between_steps
from vllm_specformer.head import slot_by_slot


class SpecFormerProposer(DFlashProposer):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        check_patches()
        check_target_class(vllm_config)
        check_cache(vllm_config)
        check_v1_verification(vllm_config.speculative_config)
        check_batch_invariance(vllm_config.speculative_config)
        keep_through_sleep(vllm_config)
        self.cut = ConfidenceCut.of(vllm_config)
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.monitor = AcceptanceMonitor(device)
        self.clock = DraftClock(device, vllm_config.parallel_config)
        self.stores_late = device.type == "cpu" and has_time_between_steps(vllm_config)
        self._left: DeferredRows | None = None
        self._num_drafted = 0
        self._last_draft_probs: Tensor | None = None
        self._drawn: DrawnBatch | None = None

    def _maybe_share_embeddings(self, target_language_model: nn.Module) -> None:
        self.model.bind_target(target_language_model)
        # The runner would skip the draft step of the WHOLE batch when one request comes near the
        # draft's maximum length, which leaves holes in the others' context K/V. We never write past
        # the target's own positions, so that length does not exist for us.
        self.runner.effective_drafter_max_model_len = 1 << 30
        if self.device.type == "cpu":
            self.model.attn.block_counts = self._block_counts
            self.model.use_cpu_norms()

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        group = kv_cache_config.kv_cache_groups[self.kv_cache_gid]
        self.model.attn.table_block_size = group.kv_cache_spec.block_size

    def _block_counts(self) -> Tensor:
        """Blocks of each row of the runner's block table for the head's KV group, int32 [rows]."""
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        return torch.from_numpy(table.num_blocks_per_row)

    def _maybe_share_lm_head(self, target_language_model: nn.Module) -> None:
        """Already shared by `bind_target`."""

    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, Tensor] | None = None,
    ) -> None:
        """One draft step of the largest size, so that memory profiling counts it."""
        requests = min(num_tokens, self.max_batch_size)
        hooks = len(self.model.config.aux_hidden_state_layer_ids)
        states = torch.zeros(
            num_tokens, hooks * self.hidden_size, dtype=self.dtype, device=self.device
        )
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        context = self.model.combine_hidden_states(self._hooks(states))
        normed, first = self.model.normalise(context), positions[:requests]
        queries = self.model.store_context_and_query(
            normed, positions, torch.full_like(positions, -1), normed[:requests], first
        )
        if not self.model.attn.is_bound:
            slots = self.model(
                context[:requests], queries, first, first, first, None, self.num_speculative_tokens
            )
            logits = self.model.compute_logits(slots.flatten(0, 1))
            # What drawing holds at once. A CPU's memory is not profiled.
            if self._enable_probabilistic_draft_probs and self.device.type != "cpu":
                logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)

    def prepare_inputs_padded(
        self, common_attn_metadata: CommonAttentionMetadata, spec_decode_metadata: Any, *args: Any
    ) -> Any:
        self._num_drafted = sum(spec_decode_metadata.num_draft_tokens)
        return super().prepare_inputs_padded(common_attn_metadata, spec_decode_metadata, *args)

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Bonus tokens [R] and how many tokens each request has gained [R], as the base class."""
        rows, columns = sampled_token_ids.shape
        is_plain = columns == 1 and self.device.type == "cpu"
        if is_plain and not bool(discard_request_mask[:rows].any()):
            # Nothing was verified or thrown away: the tokens are those that were sampled.
            return sampled_token_ids[:, 0], torch.ones(rows, dtype=torch.int32)
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )

    def _hooks(self, states: Tensor) -> tuple[Tensor, ...]:
        """The runner's concatenation [T, G*H] as G views [T, H]."""
        return states.unflatten(-1, (-1, self.hidden_size)).unbind(-2)

    @torch.inference_mode()
    def store_what_is_left(self) -> None:
        """Store the context K/V of a step that has left them for later."""
        if self._left is not None:
            self.clock.timed(self._store_left, counts=0)

    def _store_left(self) -> None:
        if self._left is not None:
            left, self._left = self._left, None
            self._store(*left)

    def _store(self, states: Tensor, positions: Tensor, slots: Tensor) -> None:
        context = self.model.combine_hidden_states(self._hooks(states))
        self.model.store_context_and_query(self.model.normalise(context), positions, slots)

    @moving_pages
    @timed
    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor | list[list[int]]:
        """Store the step's context K/V and draft.

        Args (shapes; the rest as vLLM's base class):
            num_speculative_tokens: tokens wanted, 0..K; 0 still stores K/V, if only later.
            target_positions: [T], or [3, T] of a target with M-RoPE.
            target_hidden_states: [T, G*H]; next_token_ids: [R].
            token_indices_to_sample: [R] rows of the last accepted tokens, or None after a step
                without drafts, where they are each request's last row.

        Returns:
            int64 [R, num_speculative_tokens]; with a confidence threshold lists of at most as many.
        """
        self._store_left()
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        if num_rejected_tokens_gpu is not None:
            self.monitor.observe(self._num_drafted, num_rejected_tokens_gpu)
        common = common_attn_metadata
        requests = common.batch_size()
        slot_mapping = common.slot_mapping[: len(target_hidden_states)]
        if target_positions.dim() > 1:
            # The head counts tokens, whatever positions the target gives those of an image.
            target_positions = self.runner.positions[: len(target_hidden_states)]
        if num_speculative_tokens == 0:
            if self.stores_late:
                # Copies of what the next step writes over.
                places = target_positions.clone(), slot_mapping.clone()
                self._left = (target_hidden_states, *places)
            else:
                self._store(target_hidden_states, target_positions, slot_mapping)
            return torch.empty(requests, 0, dtype=torch.int64, device=self.device)

        context = self.model.combine_hidden_states(self._hooks(target_hidden_states))
        normed = self.model.normalise(context)
        last = token_indices_to_sample
        if last is None:
            last = common.query_start_loc[1 : requests + 1] - 1
        positions = target_positions[last]
        queries = self.model.store_context_and_query(
            normed, target_positions, slot_mapping, normed[last], positions
        )
        slots = self.model(
            context[last],
            queries,
            positions,
            positions + 1,
            next_token_ids,
            common.block_table_tensor[:requests],
            num_speculative_tokens,
        )
        return self._sample(slots, next_token_ids, sampling_metadata)

    def _sample(
        self, slots: Tensor, bonus_tokens: Tensor, sampling_metadata: Any
    ) -> Tensor | list[list[int]]:
        """Draft tokens [R, n] from slot states [R, n, H]; keeps what they were drawn from."""
        self._drawn = None
        if self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy:
            drawn = DrawnBatch(self.runner, sampling_metadata.temperature, slots.shape[1])
            self._drawn = drawn if drawn.num_drawn else None
        # argmax over float32 is several times faster than over bfloat16 on a CPU.
        logits = self.model.compute_logits(slots.flatten(0, 1)).float()
        head = self.model.head
        if self.model.config.markov_rank:
            tokens, probs, logits = self._sample_in_order(
                logits.unflatten(0, slots.shape[:2]), bonus_tokens, head.markov_gates(slots)
            )
        else:
            tokens, probs = self._choose(logits)
            tokens = tokens.view(slots.shape[:2])
        if probs is not None:
            self._last_draft_probs = probs.view(*slots.shape[:2], -1).contiguous()
        if self.cut is None:
            return tokens
        # vLLM keeps no temperatures of a batch that is all greedy.
        temperature = None if sampling_metadata.all_greedy else sampling_metadata.temperature
        return self.cut.shorten(tokens, logits.view(*tokens.shape, -1), temperature)

    def _sample_in_order(
        self, logits: Tensor, bonus_tokens: Tensor, gates: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Slot by slot, each biased by the token chosen before it.

        Of logits [R, n, V or N] and the gates of the Markov term [R, n, rank].

        Returns:
            Tokens [R, n]; their probabilities, if asked for; the logits, with their bias, if
            drafts are cut.
        """
        previous, tokens, probs, biased = bonus_tokens, [], [], []
        for slot, (own, gate) in enumerate(slot_by_slot(logits, gates)):
            scores = self.model.head.biased(own, slot, previous, gate)
            previous, slot_probs = self._choose(scores, slot)
            if self.cut is not None:
                biased.append(scores)
            tokens.append(previous)
            probs.append(slot_probs)
        given = [p for p in probs if p is not None]
        return (
            torch.stack(tokens, dim=1),
            torch.stack(given, dim=1) if given else None,
            torch.stack(biased, dim=1) if biased else logits,
        )

    def _choose(self, logits: Tensor, slot: int = 0) -> tuple[Tensor, Tensor | None]:
        """Target ids [rows] and, where a request draws, the probabilities [rows, V] drawn from.

        Of logits [rows, V] of a slot, or of all; or [rows, N] of a draft vocabulary: other tokens
        have probability 0. Without probabilities vLLM takes each draft for certain, as the best
        tokens are.
        """
        head = self.model.head
        if self._drawn is None:
            # On a CPU a third of the time that PyTorch's argmax takes there.
            on_cpu = self.device.type == "cpu"
            best = torch.ops._C.greedy_argmax(logits) if on_cpu else logits.argmax(-1)
            return head.to_tokens(best), None
        chosen, probs = self._drawn.draw(logits, slot)
        return head.to_tokens(chosen), head.over_vocabulary(probs, 0.0)
