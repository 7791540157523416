"""Target and head served, one engine after the other: hooked states, greedy parity and drafts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import LLM

from support.dense import DenseReference
from support.drafts import compare, truth, watching
from support.engines import drafting, engine, greedy
from support.family_pairs import Pair
from support.outputs import Tokens, continuations, counting
from vllm_specformer.engine.model import SpecFormerDraftModel

# Hooked states of two implementations in float32, relative to their norm; a state taken in another
# place differs by tens of per cent.
SAME_STATES = 1e-5
MAX_TOKENS = 48


@dataclass(frozen=True)
class Outcome:
    states: float
    compared: int
    wrong: list[str]
    tokens_per_step: float


def served(
    pair: Pair, same_states: float = SAME_STATES, most_wrong: float = 0.0, **options: Any
) -> Outcome:
    """Serve the target without the head and with it, and hold one against the other.

    Args:
        same_states: how far a hooked state in vLLM may be from the one in training.
        most_wrong: share of the drafts that may differ from the dense head's, where states do.
        options: of both engines.
    """
    reference = DenseReference(pair.head, pair.target)
    # Where vLLM runs the Transformers class itself it makes it compile, for all its instances.
    reference.target.decoder.do_not_compile = True
    with serving(pair, **options) as llm:
        plain = answers(llm, pair.prompts)
    assert max(len(set(text)) for text in plain.values()) >= 8, "it says one thing only"

    with serving(pair, drafting(4, pair.head), **options) as llm:
        states = states_apart(llm, reference, pair.prompts[-1])
        with watching() as alone, counting(llm) as counted:
            assert answers(llm, pair.prompts) == plain
        with watching(truth(plain)) as helped, counting(llm) as with_help:
            assert answers(llm, pair.prompts) == plain
    assert states < same_states
    # Every number of drafts was accepted at some step, and some were not.
    assert min(helped.helped[n] for n in range(5)) > 0
    assert with_help["spec_decode_num_accepted_tokens"] > 0
    assert counted["spec_decode_num_accepted_tokens"] < counted["spec_decode_num_draft_tokens"]

    result = compare(reference, [*alone.drafted, *helped.drafted])
    assert len(result.wrong) <= most_wrong * result.compared, result.wrong[:5]
    assert result.compared >= 1000
    assert result.ties <= result.compared // 100
    return Outcome(states, result.compared, result.wrong, counted.tokens_per_step)


@contextmanager
def serving(pair: Pair, speculative: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    changes = options | {
        "model": str(pair.target),
        "skip_tokenizer_init": True,
        "max_model_len": 192,
    }
    with engine(speculative, **changes) as llm:
        yield llm


def answers(llm: LLM, prompts: Sequence[Tokens], length: int = MAX_TOKENS) -> dict[Tokens, Tokens]:
    params = greedy(length, detokenize=False, ignore_eos=True)
    inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return continuations(llm.generate(inputs, params, use_tqdm=False))


@torch.no_grad()
def states_apart(llm: LLM, reference: DenseReference, prompt: Tokens) -> float:
    """The largest relative difference of a hooked state over a prompt, vLLM against training."""
    seen: list[list[Tensor]] = []
    original = SpecFormerDraftModel.combine_hidden_states

    def combine(self: Any, hooked_states: Sequence[Tensor]) -> Tensor:
        seen.append([state.clone() for state in hooked_states])
        return original(self, hooked_states)

    SpecFormerDraftModel.combine_hidden_states = combine  # type: ignore[method-assign]
    try:
        answers(llm, [prompt], length=1)
    finally:
        SpecFormerDraftModel.combine_hidden_states = original  # type: ignore[method-assign]
    expected = reference.states(torch.tensor([prompt]))
    pairs = zip(seen[0], expected, strict=True)
    return max(float((a - b[0]).norm() / b.norm()) for a, b in pairs)
