"""Look into the speculator: record its drafts, and put better ones in their place."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

from support.dense import DenseReference
from support.drafts import Comparison, Drafted, compare
from support.outputs import Tokens
from support.seen_states import SeenStates
from support.v2.engines import runner
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator


@dataclass
class Watch:
    """What happened in the speculator."""

    drafted: list[Drafted] = field(default_factory=list)
    requests: Counter[int] = field(default_factory=Counter)  # steps by number of requests
    tokens: Counter[int] = field(default_factory=Counter)  # steps by number of drafts asked for
    helped: Counter[int] = field(default_factory=Counter)
    unsampled_rows: int = 0


@contextmanager
def watching(
    llm: LLM,
    continuations: Mapping[Tokens, Tokens] | None = None,
    skip_drafting: Callable[[int], bool] = lambda step: False,
) -> Iterator[Watch]:
    """Record every draft; with `continuations`, play the oracle as well.

    The oracle replaces the first n drafts of each request by the request's true greedy
    continuation, n uniform in 0..K. Every number of accepted tokens then occurs, whatever the head
    is worth. Recorded is what the head itself proposed.

    Args:
        llm: the engine; it must draft with SpecFormer.
        continuations: prompt tokens -> greedy continuation.
        skip_drafting: steps that are asked for no drafts (0.33 does so, 0.32 seldom).
    """
    watch, rng, states = Watch(), random.Random(0), runner(llm).req_states
    original = SpecFormerSpeculator.propose

    def propose(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        wanted = kwargs.get("num_speculative_tokens")
        if skip_drafting(watch.requests.total()):
            wanted = kwargs["num_speculative_tokens"] = 0
        drafts = original(self, batch, *args, **kwargs)
        num_sampled = args[4]
        watch.requests[batch.num_reqs] += 1
        made = self.num_speculative_steps if wanted is None else wanted
        watch.tokens[made] += 1
        if made == 0:
            return drafts
        drafts = drafts.clone()
        for row in range(batch.num_reqs):
            if not int(num_sampled[row]):
                watch.unsampled_rows += 1
                continue
            state = int(batch.idx_mapping[row])
            # The runner's own record of the request, not the positions we draft at.
            length = int(states.total_len.gpu[state])
            text = tuple(states.all_token_ids.gpu[state, :length].tolist())
            watch.drafted.append(Drafted(text, tuple(drafts[row, :made].tolist())))
            if continuations is not None:
                _help(drafts[row], text, int(states.prompt_len.np[state]), continuations)
        return drafts

    def _help(drafts: Tensor, text: Tokens, start: int, known: Mapping[Tokens, Tokens]) -> None:
        answer, done = known.get(text[:start], ()), len(text) - start
        if answer[:done] != text[start:]:
            return
        true = answer[done : done + rng.randint(0, len(drafts))]
        drafts[: len(true)] = torch.tensor(true, dtype=drafts.dtype)
        watch.helped[len(true)] += 1

    SpecFormerSpeculator.propose = propose  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        SpecFormerSpeculator.propose = original  # type: ignore[method-assign]


@contextmanager
def seeing(reference: SeenStates, states: Any) -> Iterator[None]:
    """Let a reference see what the speculator is given; `states` are the runner's requests."""
    original = SpecFormerSpeculator.propose

    def propose(self: SpecFormerSpeculator, batch: Any, *args: Any, **kwargs: Any) -> Any:
        hooks, num_rejected = args[3], args[5]
        starts = batch.query_start_loc.tolist()
        for row in range(batch.num_reqs):
            state = int(batch.idx_mapping[row])
            text = states.all_token_ids.gpu[state].tolist()
            for index in range(starts[row], starts[row + 1] - int(num_rejected[row])):
                reference.see(text, int(batch.positions[index]), [hook[index] for hook in hooks])
        return original(self, batch, *args, **kwargs)

    SpecFormerSpeculator.propose = propose  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpecFormerSpeculator.propose = original  # type: ignore[method-assign]


def against_dense(llm: LLM, texts: Sequence[str], params: SamplingParams) -> Comparison:
    """An engine's drafts of these texts, held against the dense head on the CPU.

    It is given the states that the engine's target handed out, so that the target's own rounding
    does not count.
    """
    reference = SeenStates()
    with watching(llm) as watch, seeing(reference, runner(llm).req_states):
        llm.generate(list(texts), params, use_tqdm=False)
    return compare(reference, watch.drafted)


def assert_all_equal(reference: DenseReference, watch: Watch, at_least: int) -> None:
    """Every recorded draft is the dense head's."""
    result = compare(reference, watch.drafted)
    print(f"drafts compared {result.compared}, wrong {len(result.wrong)}, ties {result.ties}")
    assert result.wrong == []
    assert result.compared >= at_least
    assert result.ties <= result.compared // 100
