"""How drafts are chosen from the slots' logits on vLLM's V2 model runner."""

from __future__ import annotations

from torch import Tensor
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from vllm_specformer.engine.draws.batch_v2 import keep_best
from vllm_specformer.head import slot_by_slot


class DraftSampling(DFlashSpeculator):
    """The part of `SpecFormerSpeculator` behind the head's pass; captured like the pass itself."""

    draws_with_target: bool
    # Of the step's requests those that want the best tokens; None: no such request.
    _best: Tensor | None = None
    # Whether vLLM wants to know how sure the head is of its drafts.
    _is_adaptive = False

    def _sample_in_order(self, logits: Tensor, gates: Tensor | None, bonus_tokens: Tensor) -> None:
        """Slot by slot, each biased by the token chosen before it.

        Of logits [R, n, V or N] and the gates of the Markov term [R, n, rank].

        Beside drawn drafts adaptive verification is told of those that would be the best.
        """
        head, requests, slots = self.model.head, len(logits), logits.shape[1]
        has_best = self._is_adaptive and self.draft_logits is not None
        previous = best = bonus_tokens
        for slot, (own, gate) in enumerate(slot_by_slot(logits, gates)):
            at = slice(slot, slot + 1)
            biased = likeliest = head.biased(own, slot, previous, gate)
            if has_best and slot:
                likeliest = head.biased(own, slot, best, gate)
            self._predict_acceptance(likeliest, requests, at)
            if has_best and slot + 1 < slots:
                best = head.to_tokens(likeliest.argmax(-1))
            previous = self._sample(biased, requests, at)
            self.draft_tokens[:requests, slot] = previous

    def _of_slots(self, buffer: Tensor, num_reqs: int, slots: slice) -> Tensor:
        """Some slots' entries of a flat sampling buffer [R * K]: [num_reqs * slots]."""
        rows = buffer[: num_reqs * self.num_speculative_steps].view(num_reqs, -1)
        return rows[:, slots].flatten()

    def _sample(self, logits: Tensor, num_reqs: int, slots: slice) -> Tensor:
        """Target ids drawn from `logits` [num_reqs * slots, V or N], request by request.

        Drawn tokens meet the noise of their target ids, and vLLM verifies them by cached logits of
        the whole vocabulary. So a draft vocabulary's logits are spread over it first, where the
        drafts are not simply the best ones; tokens outside have probability 0.
        """
        head = self.model.head
        is_drawn = self.draws_with_target or self.draft_logits is not None
        if is_drawn:
            logits = head.over_vocabulary(logits, float("-inf"))
        if self._best is not None:
            logits = keep_best(logits, self._best)
        requests, positions, columns = (
            self._of_slots(buffer, num_reqs, slots)
            for buffer in (self.sample_idx_mapping, self.sample_pos, self.sample_col)
        )
        if self.draws_with_target:
            return gumbel_sample(
                logits,
                requests,
                self.temperature,
                self.seeds,
                positions,
                apply_temperature=True,
                is_drafting=False,
                use_fp64=self.use_fp64_gumbel,
            )
        sampled = self.sample_draft(
            logits,
            positions,
            requests,
            self.temperature,
            self.seeds,
            columns,
            self.draft_logits,
        )
        return sampled if is_drawn else head.to_tokens(sampled)

    def _predict_acceptance(self, logits: Tensor, num_reqs: int, slots: slice) -> None:
        """Tell adaptive verification how sure the head is of some slots; nothing without it.

        By logits [num_reqs * slots, V or N] that are a function of the text alone, not of what was
        drawn. A slot must not be verified or left out because of the token drawn in it. Nor will
        the tokens drawn before it do: vLLM takes a step's budget from the confidences of an earlier
        step, whose drafts met the same noise at the same positions.
        """
        if not self._is_adaptive:
            return
        count = slots.stop - slots.start
        requests = self._of_slots(self.sample_idx_mapping, num_reqs, slots)
        predict = super()._maybe_predict_acceptance
        if count == self.num_speculative_steps:
            predict(logits, requests, self._of_slots(self.sample_col, num_reqs, slots))
            return
        # Rows that bring their slots with them are to vLLM all the slots of a request.
        for n in range(count):
            predict(logits[n::count], requests[n::count], self.sample_col[slots.start + n])

    def _maybe_predict_acceptance(
        self, logits: Tensor, idx_mapping: Tensor, draft_step: Tensor
    ) -> None:
        """Nothing: `sample_draft` calls it with what is drawn from, see `_predict_acceptance`."""

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor:
        """`sample_draft` asks for logits of hidden states; we hand it logits already."""
        return hidden_states
