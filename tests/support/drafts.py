"""Look into the proposer: record its drafts, and put better ones in their place."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from support.dense import DenseReference
from support.outputs import Tokens
from vllm_specformer.engine.proposer_v1 import SpecFormerProposer

# A request's tokens and the length of its prompt -> the tokens to draft.
Oracle = Callable[[Tokens, int], Sequence[int]]

# Below this gap two fp32 logits that were summed in different orders may change places.
TIE = 1e-4


@dataclass(frozen=True)
class Drafted:
    """One request's draft: all its tokens including the bonus token, and what the head proposed.

    `slots` is how many it computed, where a confidence threshold left some out.
    """

    text: Tokens
    drafts: Tokens
    slots: int = 0


@dataclass
class Watch:
    """What happened in the proposer."""

    drafted: list[Drafted] = field(default_factory=list)
    steps: int = 0
    unsampled_rows: int = 0
    helped: Counter[int] = field(default_factory=Counter)
    batch_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)


def truth(continuations: Mapping[Tokens, Tokens], insist: bool = False) -> Oracle:
    """Draft the known continuation of each prompt, as long as the request follows it.

    With `insist` also when it does not: drafts of some other text.
    """

    def oracle(text: Tokens, prompt_length: int) -> Sequence[int]:
        answer = continuations.get(text[:prompt_length], ())
        done = len(text) - prompt_length
        return answer[done:] if insist or answer[:done] == text[prompt_length:] else ()

    return oracle


@contextmanager
def watching(oracle: Oracle | None = None) -> Iterator[Watch]:
    """Record every draft; with an oracle, put its first n tokens in place of the head's.

    n is uniform in 0..K, so every number of accepted tokens occurs, whatever the head is worth.
    Recorded is what the head itself proposed.
    """
    watch, rng = Watch(), random.Random(0)
    original = SpecFormerProposer.propose

    def propose(self: Any, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
        drafts = original(self, num_speculative_tokens, *args, **kwargs)
        positions, bonus, last, common = (
            self.runner.positions,
            kwargs["next_token_ids"],
            kwargs["token_indices_to_sample"],
            kwargs["common_attn_metadata"],
        )
        if last is None:
            last = common.query_start_loc[1 : len(bonus) + 1] - 1
        batch = self.runner.input_batch
        watch.steps += 1
        watch.batch_sizes[len(bonus), num_speculative_tokens] += 1
        rows = drafts if isinstance(drafts, list) else drafts.tolist()
        for row in range(len(bonus)):
            position = int(positions[last[row]])
            prompt_length = int(batch.num_prompt_tokens[row])
            if position + 1 < prompt_length:
                watch.unsampled_rows += 1
                continue
            known = batch.token_ids_cpu[row, : position + 1].tolist()
            text = (*known, int(bonus[row]))
            watch.drafted.append(Drafted(text, tuple(rows[row]), num_speculative_tokens))
            if oracle is not None:
                advice = oracle(text, prompt_length)[: rng.randint(0, len(rows[row]))]
                rows[row][: len(advice)] = advice
                watch.helped[len(advice)] += 1
        if isinstance(drafts, list):
            return rows
        return torch.tensor(rows, dtype=drafts.dtype).view(drafts.shape)

    SpecFormerProposer.propose = propose
    try:
        yield watch
    finally:
        SpecFormerProposer.propose = original


@dataclass
class Comparison:
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    ties: int = 0


def compare(reference: DenseReference, drafted: Iterable[Drafted]) -> Comparison:
    """Hold every recorded draft against the dense head on the same tokens."""
    result = Comparison()
    by_number: dict[int, list[Drafted]] = {}
    for record in drafted:
        by_number.setdefault(record.slots or len(record.drafts), []).append(record)
    by_number.pop(0, None)
    for number, records in by_number.items():
        for text, group in _by_longest_text(records).items():
            anchors = [len(d.text) - 2 for d in group]
            states = reference.slot_states(text, anchors, number)
            for record, slots in zip(group, states, strict=True):
                _compare_one(reference, record, slots, result)
    return result


def _by_longest_text(drafted: Iterable[Drafted]) -> dict[Tokens, list[Drafted]]:
    """Records whose text is a beginning of another's share that one's forward pass."""
    groups: dict[Tokens, list[Drafted]] = {}
    longest: Tokens = ()
    for record in sorted(drafted, key=lambda d: d.text, reverse=True):
        if longest[: len(record.text)] != record.text:
            longest = record.text
        groups.setdefault(longest, []).append(record)
    return groups


def _compare_one(
    reference: DenseReference, record: Drafted, slots: torch.Tensor, result: Comparison
) -> None:
    previous = record.text[-1]
    for slot, draft in enumerate(record.drafts):
        scores = reference.biased(slots, slot, previous)
        expected = int(scores.argmax())
        result.compared += 1
        if draft != expected:
            if float(scores[expected] - scores[draft]) >= TIE:
                place = f"position {len(record.text) - 2}, slot {slot}"
                result.wrong.append(f"{place}: drafted {draft}, dense head says {expected}")
                return
            result.ties += 1
        previous = draft
