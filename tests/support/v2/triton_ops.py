"""The head on its Triton kernels, as on a GPU, instead of the PyTorch references."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_leaves

from support.variants import variant
from vllm_specformer import candidates, head_layers
from vllm_specformer import head as head_module
from vllm_specformer.engine import attention, speculator_v2
from vllm_specformer.engine.candidates import attention as tree_attention
from vllm_specformer.engine.candidates import kv_layers, sampler, speculator, trees


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
    use = partial(_use, monkeypatch, pausing, launches, variants)
    use(attention, "block_attention", "block_attention.launch")
    use(attention, "kv_store", "kv_store.triton_kernel")
    use(head_module, "grouped_rms_norm", "grouped_rms_norm.triton_kernel")
    use(head_module, "rotate_slots", "rotate_slots.triton_kernel")
    use(head_module, "markov_bias", "markov_bias.triton_kernel")
    monkeypatch.setattr(head_module, "is_fused", lambda logits: True)
    use(head_layers, "swiglu", "swiglu.triton_kernel")
    use(speculator_v2, "draft_inputs", "draft_inputs.triton_kernel")
    gumbel = import_module("vllm.v1.worker.gpu.sample.gumbel")
    kernel = gumbel._gumbel_sample_kernel
    watched = Launched(kernel, pausing, launches, variants)
    monkeypatch.setattr(gumbel, "_gumbel_sample_kernel", watched)
    return launches


def use_tree_triton(
    monkeypatch: pytest.MonkeyPatch,
    pausing: Callable[[], Any] = contextlib.nullcontext,
    variants: set[str] | None = None,
) -> Counter[str]:
    """As `use_triton`, for what trees of candidates launch beside it."""
    launches = use_triton(monkeypatch, pausing, variants)
    use = partial(_use, monkeypatch, pausing, launches, variants)
    # Already watched: the head's launcher is the target's, too.
    block_attention = import_module("specformer_kernels.block_attention.launch").block_attention
    monkeypatch.setattr(tree_attention, "block_attention", block_attention)
    use(candidates, "tree_candidates", "tree_candidates.triton_kernel")
    use(candidates, "extend_beam", "select_tree.triton_kernel")
    use(candidates, "select_tree", "select_tree.triton_kernel")
    use(trees, "place_trees", "place_trees.triton_kernel")
    use(speculator, "tree_paths", "tree_paths.triton_kernel")
    use(sampler, "follow", "verify.launch")
    use(kv_layers, "kv_compact", "kv_compact.triton_kernel")
    for operation, file in (
        ("place_trees", "place_trees.triton_kernel"),
        ("follow", "verify.launch"),
    ):
        launcher = import_module(f"specformer_kernels.{file}")
        monkeypatch.setattr(speculator, operation, getattr(launcher, operation))
    return launches


def _use(
    monkeypatch: pytest.MonkeyPatch,
    pausing: Callable[[], Any],
    launches: Counter[str],
    variants: set[str] | None,
    module: Any,
    operation: str,
    file: str,
) -> None:
    """Let `module` launch an operation's kernels."""
    launcher = import_module(f"specformer_kernels.{file}")
    for name in [n for n in vars(launcher) if re.fullmatch(rf"_{operation}\w*_kernel", n)]:
        watched = Launched(getattr(launcher, name), pausing, launches, variants)
        monkeypatch.setattr(launcher, name, watched)
    monkeypatch.setattr(module, operation, getattr(launcher, operation))


OUR_KERNELS = {
    "_block_attention_kernel",
    "_kv_store_kernel",
    "_grouped_rms_norm_kernel",
    "_rotate_slots_kernel",
    "_swiglu_kernel",
    "_draft_inputs_kernel",
    "_markov_bias_kernel",
}
