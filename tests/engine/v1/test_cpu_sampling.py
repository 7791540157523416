"""The repairs of vLLM's CPU sampling do what the kernels they stand in for are to do."""

from __future__ import annotations

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

from support.engines import Job, drafting, engine, prompts
from support.outputs import token_ids
from vllm_specformer.engine.patches.ledger import rows

SUMS = torch.tensor([2, 2, 5], dtype=torch.int32)  # two rows, none, three


SEEDED = SamplingParams(temperature=1, seed=11, max_tokens=12)


@pytest.fixture(scope="module", autouse=True)
def seeded_text() -> list[list[tuple[int, ...]]]:
    """vLLM puts its CPU kernels in place when a worker starts; a request with top-k survives."""
    with engine(drafting(4)) as llm:
        params = SamplingParams(temperature=1, top_k=5, max_tokens=3)
        (output,) = llm.generate(list(prompts()[:1]), params, use_tqdm=False)
        assert output.outputs[0].token_ids
        return seeded(llm)


def seeded(llm: LLM) -> list[list[tuple[int, ...]]]:
    """One after the other, so that both engines verify the same number of drafts in every step."""
    return [token_ids(Job([prompt], SEEDED).run(llm))[0] for prompt in prompts()[:4]]


def test_a_seeded_prompt_in_several_steps(seeded_text: list[list[tuple[int, ...]]]) -> None:
    """The noise of samples that are thrown away is not used up: the text is the same."""
    with engine(drafting(4), max_num_batched_tokens=16, max_num_seqs=4) as llm:
        assert seeded(llm) == seeded_text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([0.5, 9.0, 1.5]), [0.5, 0.5, 1.5, 1.5, 1.5]),
        (torch.tensor([7, 9, 8], dtype=torch.int32), [7, 7, 8, 8, 8]),
        (torch.tensor([7, 9, 8]), [7, 7, 8, 8, 8]),
    ],
    ids=["temperature", "int32", "int64"],
)
def test_values_reach_every_draft_row(values: torch.Tensor, expected: list[float]) -> None:
    assert expand_batch_to_tokens(values, SUMS, 5).tolist() == expected


def test_one_value_is_replaced() -> None:
    temperatures = torch.tensor([0.0, 2.0, 0.5])
    expanded = expand_batch_to_tokens(temperatures, SUMS, 5, replace_from=0, replace_to=1)
    assert expanded.tolist() == [1.0, 1.0, 0.5, 0.5, 0.5]


def test_top_k_of_no_rows() -> None:
    logits, none = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert apply_top_k_top_p(logits, none, None).shape == (0, 7)
    assert apply_top_k_top_p(logits, none, torch.empty(0)).shape == (0, 7)
    kept = apply_top_k_top_p(torch.arange(7.0).repeat(2, 1), torch.tensor([2, 7]), None)
    assert kept.isfinite().sum(-1).tolist() == [2, 7]


def test_repairs_are_in_place() -> None:
    states = {row["target"]: row["state"] for row in rows() if "cpu" in row["target"]}
    assert set(states.values()) == {"applied"}
    assert "vllm.utils.cpu_triton_utils:_expand_kernel_impl" in states
