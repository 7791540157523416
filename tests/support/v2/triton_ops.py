"""The head on its Triton kernels, as on a GPU, instead of the PyTorch references."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from support.variants import variant
from vllm_specformer import head as head_module
from vllm_specformer.engine import attention, speculator_v2


class Launched:
    """A kernel whose launches are counted and whose interpretation is not watched.

    `variants`, if given, gets what a launch would have to be compiled for.
    """

    def __init__(
        self,
        kernel: Any,
        pausing: Callable[[], Any],
        launches: Counter[str],
        variants: set[str] | None = None,
    ) -> None:
        self.kernel, self.pausing, self.launches = kernel, pausing, launches
        self.variants = variants

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            # vLLM samples the target's tokens with the same kernel as our drafts.
            if kwargs.get("IS_DRAFTING", True):
                self.launches[self.kernel.__name__] += 1
                if self.variants is not None:
                    self.variants.add(variant(self.kernel, args, kwargs))
            # A dispatch mode does not see a launch; views show it which tensors the kernel uses.
            for argument in tree_leaves(args):
                if isinstance(argument, Tensor):
                    argument.view_as(argument)
            with self.pausing():
                self.kernel[grid](*args, **kwargs)

        return launch


def use_triton(
    monkeypatch: pytest.MonkeyPatch,
    pausing: Callable[[], Any] = contextlib.nullcontext,
    variants: set[str] | None = None,
) -> Counter[str]:
    """Let the head run on its Triton kernels, as on a GPU; returns the count of their launches."""
    launches: Counter[str] = Counter()
    for module, operation, file in (
        (attention, "block_attention", "launch"),
        (attention, "kv_store", "triton_kernel"),
        (head_module, "grouped_rms_norm", "triton_kernel"),
        (head_module, "rotate_slots", "triton_kernel"),
        (head_module, "swiglu", "triton_kernel"),
        (speculator_v2, "draft_inputs", "triton_kernel"),
    ):
        launcher = import_module(f"specformer_kernels.{operation}.{file}")
        kernel = getattr(launcher, f"_{operation}_kernel")
        watched = Launched(kernel, pausing, launches, variants)
        monkeypatch.setattr(launcher, f"_{operation}_kernel", watched)
        monkeypatch.setattr(module, operation, getattr(launcher, operation))
    gumbel = import_module("vllm.v1.worker.gpu.sample.gumbel")
    kernel = gumbel._gumbel_sample_kernel
    watched = Launched(kernel, pausing, launches, variants)
    monkeypatch.setattr(gumbel, "_gumbel_sample_kernel", watched)
    return launches


OUR_KERNELS = {
    "_block_attention_kernel",
    "_kv_store_kernel",
    "_grouped_rms_norm_kernel",
    "_rotate_slots_kernel",
    "_swiglu_kernel",
    "_draft_inputs_kernel",
}
