"""The head's norms on a CPU against what the head computes by itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from vllm_specformer.engine.cpu_norms import HookNorm, use_for
from vllm_specformer.head import RMSNorm, SpecFormerHead

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD = Path(__file__).parents[2] / "examples" / "models" / "python-specformer"


@pytest.fixture
def head() -> SpecFormerHead:
    head: SpecFormerHead = SpecFormerHead.from_pretrained(HEAD, dtype=torch.float32)
    return head.requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_hooked_states(head: SpecFormerHead, rows: int, dtype: torch.dtype) -> None:
    head = head.to(dtype)
    hooks, size = head.hook_norm_weight.shape
    joined = (3 * torch.randn(rows, hooks * size)).to(dtype)
    views = joined.unflatten(-1, (hooks, size)).unbind(-2)  # as the runner's rows come
    before = joined.clone()
    found = head.fc(HookNorm(head)(views))
    expected = head.double().combine([view.double() for view in views])
    # The product rounds both factors; the norm does so twice.
    bound = 4 * torch.finfo(dtype).eps * (float(expected.abs().max()) if rows else 1.0)
    assert torch.equal(joined, before)
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_norm_of_the_head(head: SpecFormerHead, dtype: torch.dtype) -> None:
    head = head.to(dtype)
    own = copy.deepcopy(head)
    use_for(own)
    columns = (3 * torch.randn(2, head.config.hidden_size, 5)).to(dtype)
    states = columns.transpose(1, 2)  # not contiguous
    norms = [name for name, module in head.named_modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5
    for name in norms:
        expected = head.get_submodule(name).double()(states.double())
        found = own.get_submodule(name)(states).double()
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
