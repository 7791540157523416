"""Every draft the engine proposes is the one the dense head proposes on the same tokens.

Losslessness does not show that the head's paged cache is right: with wrong K/V the output stays the
same and only acceptance falls. This does show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from support.dense import DenseReference
from support.drafts import Watch, compare, truth, watching
from support.engines import Job, drafting, engine, greedy, prompts, run_plain
from support.heads import make_head
from support.outputs import Counted, Tokens, continuations, counting, token_ids
from support.paths import HEAD
from support.personalities import personality
from vllm_specformer.engine.cpu.pages import CpuPages

Answers = dict[Tokens, Tokens]

MAX_TOKENS = 32
TEXTS = prompts()[:24]
# Long prompts that fill whole blocks of the prefix cache, each extending the one before.
LONG = ["\n\n\n".join(prompts()[: 4 + n]) for n in range(4)]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head that leans on its context; what it was trained for does not matter here."""
    return make_head(tmp_path_factory.mktemp("head"), "default", num_draft_slots=6, markov_rank=16)


@pytest.fixture(scope="module")
def reference(head: Path) -> DenseReference:
    return DenseReference(head)


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Long greedy continuations by the target alone, for the oracle."""
    jobs = {"short": Job(TEXTS, greedy(160)), "long": Job(LONG, greedy(MAX_TOKENS))}
    outputs = run_plain(jobs)
    return continuations(outputs["short"]) | continuations(outputs["long"])


def drafts_of(
    texts: Sequence[str],
    params: SamplingParams | Sequence[SamplingParams],
    answers: Mapping[Tokens, Tokens],
    speculative: dict[str, Any],
    oracle: bool = True,
    repeat: int = 1,
    **changes: Any,
) -> tuple[Watch, Counted]:
    """Run the texts `repeat` times and check that the output is the target's own."""
    with (
        engine(speculative, **changes) as llm,
        watching(truth(answers) if oracle else None) as watch,
        counting(llm) as counted,
    ):
        for _ in range(repeat):
            found = continuations(Job(texts, params).run(llm))
            assert all(answers[p][: len(t)] == t for p, t in found.items())
    return watch, counted


def assert_all_equal(reference: DenseReference, watch: Watch, at_least: int) -> None:
    result = compare(reference, watch.drafted)
    print(f"drafts compared {result.compared}, wrong {len(result.wrong)}, ties {result.ties}")
    assert result.wrong == []
    assert result.compared >= at_least
    assert result.ties <= result.compared // 100


def test_plain(head: Path, reference: DenseReference, answers: Answers) -> None:
    watch, _ = drafts_of(TEXTS, greedy(MAX_TOKENS), answers, drafting(4, head), oracle=False)
    assert_all_equal(reference, watch, at_least=1000)


def test_trained_head(answers: Answers) -> None:
    watch, _ = drafts_of(TEXTS, greedy(MAX_TOKENS), answers, drafting(4, HEAD))
    assert_all_equal(DenseReference(HEAD), watch, at_least=500)


def test_positions_of_the_targets_own(
    head: Path, reference: DenseReference, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target with M-RoPE hands over three positions a token, less than its index after images."""
    own = GPUModelRunner._get_positions

    def positions(self: Any, num_tokens: Any) -> Tensor:
        index = own(self, num_tokens)
        return torch.stack((index // 2, index // 3, index // 2))

    monkeypatch.setattr(GPUModelRunner, "_get_positions", positions)
    watch, _ = drafts_of(TEXTS[:8], greedy(16), answers, drafting(4, head))
    assert_all_equal(reference, watch, at_least=100)


@pytest.mark.parametrize("name", ["in-place", "pages-of-32"])
def test_under_a_personality_of_cuda(
    name: str, head: Path, reference: DenseReference, answers: Answers
) -> None:
    """The prompts are longer than a block of 64."""
    texts, params = [*TEXTS[:4], *LONG[:2]], greedy(16)
    with personality(name) as changes:
        watch, _ = drafts_of(texts, params, answers, drafting(4, head), **changes)
    assert_all_equal(reference, watch, at_least=100)


def test_a_wrong_cache_would_be_seen(
    head: Path, reference: DenseReference, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself is worth something: K/V one position off give other drafts."""
    from vllm_specformer.engine.model import SpecFormerDraftModel

    store = SpecFormerDraftModel.store_context_and_query

    def store_shifted(model: Any, context: Any, positions: Any, *rest: Any) -> Any:
        return store(model, context, positions + 1, *rest)

    monkeypatch.setattr(SpecFormerDraftModel, "store_context_and_query", store_shifted)
    watch, _ = drafts_of(TEXTS[:4], greedy(8), answers, drafting(4, head), oracle=False)
    assert compare(reference, watch.drafted).wrong


def test_after_rejections(head: Path, reference: DenseReference, answers: Answers) -> None:
    watch, counted = drafts_of(TEXTS, greedy(MAX_TOKENS), answers, drafting(4, head))
    assert min(watch.helped[n] for n in range(5)) > 0
    accepted = counted["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counted["spec_decode_num_draft_tokens"]
    assert_all_equal(reference, watch, at_least=500)


def test_chunked_prefill(head: Path, reference: DenseReference, answers: Answers) -> None:
    watch, _ = drafts_of(
        [*TEXTS[:8], *LONG[:2]],
        greedy(MAX_TOKENS),
        answers,
        drafting(4, head),
        max_num_batched_tokens=48,
        max_num_seqs=8,
    )
    assert watch.unsampled_rows > 0, "no prompt was cut"
    assert_all_equal(reference, watch, at_least=200)


@pytest.mark.parametrize("keep_last_block", [False, True])
def test_prefix_cache(
    head: Path, reference: DenseReference, answers: Answers, keep_last_block: bool
) -> None:
    watch, counted = drafts_of(
        LONG,
        greedy(MAX_TOKENS),
        answers,
        drafting(4, head, disable_eagle_block_drop=keep_last_block),
        repeat=2,
        enable_prefix_caching=True,
    )
    assert counted["prefix_cache_hits"] >= 32 * len(LONG)
    assert_all_equal(reference, watch, at_least=200)


def test_preemption(head: Path, reference: DenseReference, answers: Answers) -> None:
    watch, counted = drafts_of(
        TEXTS[:6],
        greedy(96, ignore_eos=True),
        answers_ignoring_eos(),
        drafting(4, head),
        max_model_len=192,
        num_gpu_blocks_override=14,
        block_size=32,
    )
    assert counted["num_preemptions"] > 0
    assert_all_equal(reference, watch, at_least=500)


def answers_ignoring_eos() -> Answers:
    job = Job(TEXTS[:6], greedy(96, ignore_eos=True))
    return continuations(run_plain({"all": job}, max_model_len=192)["all"])


def test_requests_at_the_maximum_length(
    head: Path, reference: DenseReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request runs into max_model_len while the others go on drafting beside it."""
    limit = 128
    params = [greedy(160, ignore_eos=True)] * 4 + [greedy(60, ignore_eos=True)] * 4
    job = Job(TEXTS[:8], params)
    plain = run_plain({"all": job}, max_model_len=limit)["all"]
    expected = continuations(plain)
    assert [o.outputs[0].finish_reason for o in plain] == ["length"] * 8
    assert any(len(p) + len(t) == limit for p, t in expected.items())
    # The slots of the longest request have no page: vLLM allocates none behind that length.
    copied = []
    copies = CpuPages.copies

    def counted(pages: CpuPages, table: Tensor, *rest: Any) -> Any:
        copied.append(len(table))
        return copies(pages, table, *rest)

    monkeypatch.setattr(CpuPages, "copies", counted)
    with (
        engine(drafting(4, head), max_model_len=limit) as llm,
        watching(truth(expected)) as watch,
    ):
        assert token_ids(job.run(llm)) == token_ids(plain)
    assert max(len(d.text) for d in watch.drafted) >= limit - 1
    assert copied
    assert max(copied) < 8, "requests with room were copied too"
    assert_all_equal(reference, watch, at_least=300)


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_other_heads(tmp_path: Path, answers: Answers, preset: str) -> None:
    """The second has more K/V heads than the target, hence pages of another size."""
    changes = {"draft_vocab_size": 700, "markov_rank": 8, "markov_gate": True}
    if preset == "default":
        changes = {"num_key_value_heads": 4, "num_draft_slots": 5}
    changes |= {"num_slot_layers": 2}
    head = make_head(tmp_path / "head", preset, **changes)
    watch, _ = drafts_of(TEXTS[:12], greedy(MAX_TOKENS), answers, drafting(4, head))
    assert_all_equal(DenseReference(head), watch, at_least=300)


def test_a_window_over_the_context(tmp_path: Path, answers: Answers) -> None:
    """The head sees the first tokens and the last ones; without the window it drafts others."""
    window = {"context_window": 24, "context_sinks": 3}
    head = make_head(tmp_path / "head", "default", num_draft_slots=4, **window)
    watch, _ = drafts_of([*TEXTS[:6], *LONG[:2]], greedy(16), answers, drafting(4, head))
    reference = DenseReference(head)
    assert_all_equal(reference, watch, at_least=100)
    reference.head.config.context_window = 0
    assert compare(reference, watch.drafted).wrong


def test_fewer_drafts_than_slots(head: Path, reference: DenseReference, answers: Answers) -> None:
    watch, _ = drafts_of(TEXTS[:12], greedy(MAX_TOKENS), answers, drafting(1, head))
    assert {len(d.drafts) for d in watch.drafted} == {1}
    assert_all_equal(reference, watch, at_least=100)
