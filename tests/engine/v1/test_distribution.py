"""Sampled output with speculation has the target's own distribution.

The exact joint distribution of the first three generated tokens under top-k sampling is computed
from the Hugging Face target, and Pearson's chi-square test compares thousands of samples with it.
The first token comes from the prompt's own step; the second and third pass the rejection sampler.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, CompletionOutput, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from support.dense import DenseReference
from support.drafts import truth, watching
from support.engines import drafting, engine, prompts
from support.laws import LEVEL, MIN_EXPECTED, TOP_K, Law, assert_law, joint_law, p_value
from support.outputs import Tokens, counting, token_ids
from support.paths import HEAD, TARGET
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.engine.speculative_config import CONFIDENCE
from vllm_specformer.head import SpecFormerHead

SAMPLES = 4000
DEPTH = 3
PROMPT = prompts()[1]
# Share of sampled steps' first drafts that the trained head gets accepted; below it the test would
# see rejections only. The oracle's share comes on top.
MIN_ACCEPTED = 0.05

# A threshold that the drafts of the lawful head with a Markov term pass sometimes.
CUT = 0.05
TOP_P = 0.85
# Short enough that the head often drafts what it forbids.
GRAMMAR = r"return [a-z]{2}"


@pytest.fixture(scope="module")
def reference() -> DenseReference:
    return DenseReference()


@pytest.fixture(scope="module")
def laws(reference: DenseReference, prompt: Tokens) -> dict[int, Law]:
    return {depth: joint_law(reference, prompt, depth, 1.0) for depth in range(1, DEPTH + 1)}


@pytest.fixture(scope="module")
def prompt() -> Tokens:
    from support.engines import tokenizer

    return tuple(tokenizer()(PROMPT)["input_ids"])


def lawful_head(
    directory: Path, reference: DenseReference, laws: Mapping[int, Law], restricted: bool
) -> Path:
    """A head whose slots say, whatever the context, how often a token stands at their depth.

    So a good share of its drafts is accepted, and each slot has a distribution of its own: drafts
    verified with another slot's probabilities would bend the law. `restricted` heads have a Markov
    term and a draft vocabulary that lacks every third token of the law.
    """
    said = sorted({token for text in laws[DEPTH] for token in text})
    scored = torch.tensor([token for place, token in enumerate(said) if place % 3])
    markov_rank = 4 if restricted else 0
    config = SpecFormerConfig.preset(
        "default", reference.target.target.config, str(TARGET), num_draft_slots=4,
        markov_rank=markov_rank, draft_vocab_size=len(scored) if restricted else 0,
    )  # fmt: skip
    torch.manual_seed(0)
    head = SpecFormerHead(config)
    wanted = torch.zeros(4, config.vocab_size)
    for slot in range(4):
        depth = min(slot + 2, DEPTH)
        for text, p in laws[depth].items():
            wanted[slot, text[-1]] += p
    states = torch.randn(4, config.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([states], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference.target.logits(states), wanted).backward()
        optimizer.step()
    with torch.no_grad():
        for layer in (head.slot_attn.o_proj, head.ffn.down_proj, head.positional_proj):
            layer.weight.zero_()
        head.positional_proj.bias.copy_(states.flatten())
        if restricted:
            head.draft_token_ids.copy_(scored)
            head.markov_lm_head.weight.normal_(std=0.5)
            head.markov_embed.weight.normal_(std=0.5)
    head.save_pretrained(directory)
    return directory


def sample(llm: LLM, prompt: Tokens, **changes: Any) -> list[Tokens]:
    params = SamplingParams(
        n=SAMPLES, temperature=1, top_k=TOP_K, max_tokens=DEPTH, ignore_eos=True, **changes
    )
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    samples = [tuple(c.token_ids) for c in output.outputs]
    assert len(samples) == SAMPLES
    return samples


def test_the_law_is_rich_and_the_test_sharp(
    reference: DenseReference, prompt: Tokens, laws: dict[int, Law]
) -> None:
    """The target's own samples pass; those of a slightly warmer target do not."""
    generator = torch.Generator().manual_seed(0)

    def draw(law: Law) -> list[Tokens]:
        weights = torch.tensor(list(law.values()))
        drawn = torch.multinomial(weights, SAMPLES, replacement=True, generator=generator)
        return [list(law)[i] for i in drawn.tolist()]

    assert sum(-p * torch.tensor(p).log().item() for p in laws[DEPTH].values()) > 1.5
    assert_law(laws, draw(laws[DEPTH]))
    warm = Counter(draw(joint_law(reference, prompt, DEPTH, 1.25)))
    assert p_value(laws[DEPTH], warm) < LEVEL / 100


def most_likely(laws: Mapping[int, Law], prompt: Tokens) -> Any:
    """An oracle that drafts the target's most likely tokens after what was sampled."""
    best: dict[Tokens, int] = {}
    for depth in range(1, DEPTH + 1):
        for text, _ in sorted(laws[depth].items(), key=lambda item: item[1]):
            best[text[:-1]] = text[-1]

    def oracle(text: Tokens, prompt_length: int) -> Sequence[int]:
        advice: Tokens = ()
        while (done := text[prompt_length:] + advice) in best:
            advice += (best[done],)
        return advice

    return oracle


def test_greedy_drafts(laws: dict[int, Law], prompt: Tokens) -> None:
    """The head's own, and an oracle's; in one engine, which takes long to start."""
    oracle = most_likely(laws, prompt)
    speculative = drafting(4, draft_sample_method="greedy")
    with engine(speculative, max_num_seqs=128, max_model_len=128) as llm:
        for advice, least_accepted in ((None, MIN_ACCEPTED), (oracle, 0.1)):
            with watching(advice), counting(llm) as counted:
                assert_law(laws, sample(llm, prompt))
            accepted = counted["spec_decode_num_accepted_tokens"]
            assert accepted >= least_accepted * counted["spec_decode_num_drafts"]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("no-markov", marks=pytest.mark.slow),
        "markov-vocabulary",
        "trained",
        pytest.param("cut", marks=pytest.mark.slow),
    ],
)
def test_sampled_drafts(
    tmp_path: Path, reference: DenseReference, laws: dict[int, Law], prompt: Tokens, kind: str
) -> None:
    """The default: drafts are drawn, and verified as such.

    "cut" leaves drafts out by confidence: how many there are hangs on those drawn before.
    """
    head = HEAD
    if kind != "trained":
        head = lawful_head(tmp_path / "head", reference, laws, kind in ("markov-vocabulary", "cut"))
    speculative = drafting(4, head)
    if kind == "cut":
        speculative[CONFIDENCE] = CUT
    with (
        engine(speculative, max_num_seqs=128, max_model_len=128) as llm,
        watching() as watch,
        counting(llm) as counted,
    ):
        assert_law(laws, sample(llm, prompt))
    # Requests that stand at the same text must get different drafts.
    at_one_text = Counter(d.text for d in watch.drafted).most_common(1)[0][0]
    assert len({d.drafts for d in watch.drafted if d.text == at_one_text}) > 20
    assert len(Counter(len(d.drafts) for d in watch.drafted)) >= (3 if kind == "cut" else 1)
    accepted = counted["spec_decode_num_accepted_tokens"] / counted["spec_decode_num_drafts"]
    print(f"accepted per step: {accepted:.3f}")
    assert accepted >= (MIN_ACCEPTED if kind == "trained" else 0.1)


@pytest.mark.slow
def test_drafts_of_requests_with_top_p_or_a_seed(
    reference: DenseReference, laws: dict[int, Law], prompt: Tokens
) -> None:
    """Drawn from the whole distribution though the text is not, and from a stream of their own."""
    nucleus = {
        depth: joint_law(reference, prompt, depth, 1.0, TOP_P) for depth in range(1, DEPTH + 1)
    }
    assert len(nucleus[DEPTH]) < len(laws[DEPTH]) / 2
    with engine(drafting(4), max_num_seqs=128, max_model_len=128) as llm:
        for law, changes in ((nucleus, {"top_p": TOP_P}), (laws, {"seed": 5})):
            with watching() as watch, counting(llm) as counted:
                assert_law(law, sample(llm, prompt, **changes))
            at_one_text = Counter(d.text for d in watch.drafted).most_common(1)[0][0]
            assert len({d.drafts for d in watch.drafted if d.text == at_one_text}) > 20
            accepted = counted["spec_decode_num_accepted_tokens"]
            assert accepted > MIN_ACCEPTED * counted["spec_decode_num_drafts"]


def spoken(llm: LLM, prompt: Tokens) -> list[CompletionOutput]:
    """What is written under the grammar."""
    grammar = StructuredOutputsParams(regex=GRAMMAR)
    params = SamplingParams(n=SAMPLES, temperature=1, max_tokens=16, structured_outputs=grammar)
    (output,) = llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
    assert all(re.fullmatch(GRAMMAR, completion.text) for completion in output.outputs)
    return output.outputs


def likeness(*sets: Sequence[CompletionOutput]) -> float:
    """Probability that two sets of SAMPLES come out this different if their law is one."""
    some, others = (Counter(completion.text for completion in found) for found in sets)
    both = some + others
    rare = {text for text, count in both.items() if count < 2 * MIN_EXPECTED}
    pairs = [(some[text], others[text]) for text in both.keys() - rare]
    pairs.append((sum(some[text] for text in rare), sum(others[text] for text in rare)))
    assert len(pairs) > 10
    statistic = sum((a - b) ** 2 / max(1, a + b) for a, b in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


@pytest.mark.slow
def test_a_grammar_keeps_the_law(tmp_path: Path, reference: DenseReference, prompt: Tokens) -> None:
    """It cuts drafts off by their values; the head drafts something forbidden half of the time."""
    changes: dict[str, Any] = {"max_num_seqs": 128, "max_model_len": 128}
    with engine(None, **changes) as llm:
        plain = spoken(llm, prompt)
    after_return = Counter(completion.token_ids[1] for completion in plain)
    token, said = next(pair for pair in after_return.most_common() if pair[1] < SAMPLES / 2)
    assert said > SAMPLES / 20
    drafted = {depth: {(token,): 0.55, (prompt[-1],): 0.45} for depth in range(1, DEPTH + 1)}
    head = lawful_head(tmp_path / "head", reference, drafted, restricted=False)
    with engine(drafting(4, head), **changes) as llm, counting(llm) as counted:
        alike = likeness(plain, spoken(llm, prompt))
    print(f"p-value: {alike:.3g}")
    assert alike > LEVEL
    assert counted["spec_decode_num_accepted_tokens"] > 0


def mixed_batch(texts: Sequence[str]) -> list[SamplingParams]:
    """Every second request is greedy, the others have seeds and filters of several kinds."""
    filters: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 1}, {"top_k": 9}]
    return [
        SamplingParams(temperature=0, max_tokens=24)
        if number % 2
        else SamplingParams(
            temperature=1, max_tokens=24, seed=number, **filters[number // 2 % len(filters)]
        )
        for number in range(len(texts))
    ]


def test_greedy_and_seeded_requests_in_one_batch() -> None:
    """Greedy stays greedy beside drawn drafts; a seeded request repeats itself in other company."""
    texts = prompts()[:20]
    greedy = SamplingParams(temperature=0, max_tokens=24)
    with engine(None) as llm:
        plain = llm.generate(list(texts), greedy, use_tqdm=False)
    expected = {tuple(o.prompt_token_ids or ()): tuple(o.outputs[0].token_ids) for o in plain}
    params = mixed_batch(texts)
    with engine(drafting(4)) as llm, watching(truth(expected)):
        outputs = llm.generate(list(texts), params, use_tqdm=False)
    for found, alone in list(zip(outputs, plain, strict=True))[1::2]:
        assert found.outputs[0].token_ids == alone.outputs[0].token_ids
    with engine(drafting(4)) as llm:
        together = llm.generate(list(texts), params, use_tqdm=False)
        seeded = llm.generate(list(texts[::2]), params[::2], use_tqdm=False)
    assert token_ids(seeded) == token_ids(together[::2])
