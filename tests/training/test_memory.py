"""Peak memory of a training step does not grow with the number of slots."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from support.training_texts import make_texts
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.packing import collate

# The bound, for what is beyond the head's own size.
GROWTH = 1.10


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before | self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def plain(head: PackedHead, rows: HookedRows, target: HookedTarget, objective: Objective) -> None:
    """The same loss with the logits of all slots at once."""
    slots = len(objective.slot_weights)
    states = head.slot_states(head._context(rows), rows, target, slice(None), slots)
    logits = target.logits(states)
    F.cross_entropy(logits.flatten(0, 2), rows.labels(slots).flatten()).backward()


def ours(head: PackedHead, rows: HookedRows, target: HookedTarget, objective: Objective) -> None:
    head(rows, target, len(objective.slot_weights), objective)[0].backward()


Step = Callable[[PackedHead, HookedRows, HookedTarget, Objective], None]


def peak(step: Step, slots: int, vocabulary: int, memory: int) -> int:
    """Peak bytes of one step beyond the head's own: its gradients, and those of one part."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        architectures=["Qwen3ForCausalLM"],
    )
    model = Qwen3ForCausalLM(config)
    head = PackedHead(SpecFormerConfig.preset("default", config, "t", num_draft_slots=slots))
    target = HookedTarget(model, head.config.aux_hidden_state_layer_ids)
    texts = make_texts(8, vocabulary, shortest=40, longest=60)
    fields = collate(texts, [[0, 1, 2, 3], [4, 5, 6, 7]], None, None)
    states, last = target(fields["input_ids"], fields["position_ids"])
    rows = HookedRows(states, last, **fields)
    objective = Objective((1.0,) * slots, memory=memory)
    head.rotary(torch.device("cpu"))  # made once in a run
    with PeakMemory() as tracker:
        step(head, rows, target, objective)
    own = sum(p.numel() * p.element_size() for p in head.parameters())
    return tracker.peak - 2 * own


# Logits are most of it in the first case; in the second it is the slots' own activations, which
# only taking the anchors in parts can bound.
CASES = {"large vocabulary": (8192, 8 << 20), "parts": (512, 1 << 20)}


@pytest.mark.parametrize("case", CASES)
def test_eight_slots_take_no_more_than_two(case: str) -> None:
    two, eight = (peak(ours, slots, *CASES[case]) for slots in (2, 8))
    assert eight < GROWTH * two


@pytest.mark.parametrize("case", CASES)
def test_a_plain_step_takes_more(case: str) -> None:
    """What the test above relies on: it notices a step that holds every slot's logits."""
    two, eight = (peak(plain, slots, *CASES[case]) for slots in (2, 8))
    assert eight > 2 * two


def test_memory_stays_within_what_was_asked_for() -> None:
    vocabulary, memory = CASES["large vocabulary"]
    assert peak(ours, 8, vocabulary, memory) < memory
