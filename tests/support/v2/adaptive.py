"""Adaptive verification on the CPU: what a GPU would have brought, and what it decided.

vLLM asks for full CUDA graphs and for attention that they can hold; a CPU has none. So these checks
are answered as on a GPU, and the steps' costs, which vLLM measures with its graphs, are given to
its manager by the same method that the measurement ends in. All else is vLLM's: the budget, the
ranking, the layout of the rows, and attention that reads query lengths from the device's tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from vllm import LLM
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

from support.dense import DenseReference
from support.outputs import Tokens
from support.v2.engines import engine, runner
from vllm_specformer.calibration import Calibration, Calibrations
from vllm_specformer.engine.speculative_config import CONFIDENCE
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator

# Milliseconds by rows of the target: a row costs as much as a third of the first one.
ROW_COST = 1 / 3


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let engines that are built meanwhile verify adaptively."""
    load_general_plugins()  # which change what is changed here
    validate = VllmConfig._validate_adaptive_verification

    def with_graphs(self: VllmConfig) -> None:
        compilation = self.compilation_config
        with mock.patch.object(compilation, "cudagraph_mode", CUDAGraphMode.FULL_DECODE_ONLY):
            validate(self)

    def mode(mode: CUDAGraphMode, **_: Any) -> CUDAGraphMode:
        return mode

    def always(*_: Any) -> AttentionCGSupport:
        return AttentionCGSupport.ALWAYS

    with ExitStack() as stack:
        for owner, name, value in (
            (VllmConfig, "_validate_adaptive_verification", with_graphs),
            (model_runner, "resolve_adaptive_cudagraph_mode", mode),
            (CPUAttentionMetadataBuilder, "get_cudagraph_support", classmethod(always)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextmanager
def adaptive_engine(
    speculative: dict[str, Any], row_cost: float = ROW_COST, **changes: Any
) -> Iterator[LLM]:
    """An engine that verifies adaptively, by costs of 1 + row_cost * rows for every step."""
    speculative = speculative | {"enable_adaptive_verification": True}
    with ExitStack() as stack:
        with as_on_a_gpu():
            llm = stack.enter_context(engine(speculative, **changes))
        set_costs(llm, row_cost)
        yield llm


@contextmanager
def cut_engine(speculative: dict[str, Any], threshold: Any, **changes: Any) -> Iterator[LLM]:
    """An engine that cuts drafts at a confidence threshold."""
    with ExitStack() as stack:
        with as_on_a_gpu():
            llm = stack.enter_context(engine(speculative | {CONFIDENCE: threshold}, **changes))
        yield llm


def set_costs(llm: LLM, row_cost: float) -> None:
    """Tell vLLM's manager what a step's rows cost."""
    states = runner(llm).req_states
    rows = range(1, states.max_num_batched_tokens + 1)
    runner(llm).adaptive_verification.set_cost_curves(
        [(n, 0.0) for n in (1, states.max_num_reqs)], [(n, 1 + row_cost * n) for n in rows]
    )


@dataclass
class Step:
    """What vLLM decided about one step with drafts.

    Attributes:
        budget: drafts it admitted in all.
        scheduled: drafts of each request, int [R].
        admitted: of them those that are verified, int [R].
        confidences: of the slots, float32 [R, K], as they were ranked.
    """

    budget: int
    scheduled: list[int]
    admitted: list[int]
    confidences: Tensor


@dataclass
class Admissions:
    """All steps, and how often a request had so many drafts admitted."""

    steps: list[Step] = field(default_factory=list)

    @property
    def admitted(self) -> Counter[int]:
        return Counter(n for step in self.steps for n in step.admitted)

    @property
    def trimmed(self) -> int:
        """Steps that verified some drafts and left some out."""
        return sum(0 < step.budget < sum(step.scheduled) for step in self.steps)


@contextmanager
def watching_admissions() -> Iterator[Admissions]:
    """Record what vLLM admits."""
    seen = Admissions()
    original = AdaptiveVerificationManager.reallocate_drafts

    def reallocate(self: Any, req_ids: list[str], idx_mapping: Tensor) -> Any:
        drafts, _, budget = self._batch_budget
        confidences = self._confidence_probs[idx_mapping].clone()
        starts, rows, count = original(self, req_ids, idx_mapping)
        admitted = (starts.diff() - self.num_bonus_tokens).tolist()
        scheduled = [drafts[name] for name in req_ids]
        seen.steps.append(Step(budget, scheduled, admitted, confidences))
        return starts, rows, count

    with mock.patch.object(AdaptiveVerificationManager, "reallocate_drafts", reallocate):
        yield seen


@dataclass(frozen=True)
class Told:
    """What a draft step told of one request's drafts.

    Attributes:
        text: its tokens, the bonus token included.
        temperature: of the request.
        drafts: those that were asked for, n.
        chances: of their slots, n, each if the ones before it are accepted.
    """

    text: Tokens
    temperature: float
    drafts: Tokens
    chances: tuple[float, ...]


@contextmanager
def watching_chances(llm: LLM) -> Iterator[list[Told]]:
    """Record what every draft step tells adaptive verification."""
    seen: list[Told] = []
    original, states = SpecFormerSpeculator.propose, runner(llm).req_states

    def propose(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.draft_token_confidence_probs.fill_(math.nan)
        drafts = original(self, batch, *args, **kwargs)
        wanted = kwargs.get("num_speculative_tokens")
        made = self.num_speculative_steps if wanted is None else wanted
        for row in range(batch.num_reqs if made else 0):
            if not int(args[4][row]):
                continue
            state = int(batch.idx_mapping[row])
            text = states.all_token_ids.gpu[state, : int(states.total_len.gpu[state])]
            chances = self.draft_token_confidence_probs[row, :made]
            seen.append(
                Told(
                    tuple(text.tolist()),
                    float(self.temperature[state]),
                    tuple(drafts[row, :made].tolist()),
                    tuple(chances.tolist()),
                )
            )
        return drafts

    with mock.patch.object(SpecFormerSpeculator, "propose", propose):
        yield seen


def as_it_is(estimator: Any) -> Calibrations:
    """The curve of vLLM's estimator, which is one for all requests."""
    curve = Calibration(float(estimator.slope), tuple(estimator.intercepts.tolist()))
    return Calibrations(curve, curve)


def dense_chances(reference: DenseReference, told: Told, curves: Calibrations) -> list[float]:
    """The same by the dense head, along its best tokens."""
    slots = reference.slot_states(told.text, [len(told.text) - 2], len(told.chances))[0]
    curve = curves.sampled if told.temperature else curves.greedy
    previous, chances = told.text[-1], []
    for slot, intercept in zip(range(len(slots)), curve.intercepts, strict=False):
        biased = reference.biased(slots, slot, previous)
        previous = int(biased.argmax())
        largest = (biased / (told.temperature or 1)).softmax(-1).max()
        chances.append(float(torch.sigmoid(curve.slope * largest.logit() + intercept)))
    return chances


def best_prefixes(step: Step) -> list[int]:
    """Drafts of each request among the step's `budget` likeliest, by their confidences' products.

    Worked out one draft at a time: the next is the request's whose next draft is the likeliest.
    """
    survival = np.cumprod(step.confidences.numpy(), axis=1)
    taken = [0] * len(step.scheduled)
    for _ in range(step.budget):
        open_ = [row for row, n in enumerate(taken) if n < step.scheduled[row]]
        best = max(open_, key=lambda row: survival[row, taken[row]])
        taken[best] += 1
    return taken


def ties(step: Step) -> bool:
    """Whether two requests' slots are as likely: either may then be taken."""
    survival = step.confidences.cumprod(1)
    rows = [survival[row, :n] for row, n in enumerate(step.scheduled)]
    flat = torch.cat(rows)
    return len(flat.unique()) < len(flat)
