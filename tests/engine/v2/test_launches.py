"""How many kernels a draft step launches on V2: outside of the graph, and in it.

At a few microseconds each they are what a small batch notices. The predictions of
benchmarks/gpu_stages/predict.py take their numbers from here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gpu_stages.predict import DRAFT_LAUNCHES, GATE_LAUNCHES, SLOT_LAUNCHES, STAGE_LAUNCHES
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from support.engines import drafting, greedy
from support.heads import make_head
from support.v2.engines import TEXTS, K, engine
from support.v2.triton_ops import use_triton
from vllm_specformer.engine.speculator_v2 import SpecFormerSpeculator
from vllm_specformer.training.settings import MARKOV_RANK

# They make a tensor's place in memory, not its content.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
# Torch's own view of types, on no device.
NO_LAUNCH |= {"promote_types"}
# The target's final norm in plain operators on a CPU: one kernel on a GPU, counted as `mul`.
TARGET_NORM = {"pow", "mean", "rsqrt"}
# Of all that a draft step does, the monitor of accepted drafts included.
MOST_LAUNCHES = 42
# Attention splits its context over programs on a GPU and joins the parts, in two launches.
JOINED = "_block_attention_kernel"


class Launches(TorchDispatchMode):
    """Counts operators that do more than look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        aliases = (result.alias_info for result in func._schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in NO_LAUNCH | TARGET_NORM:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_markov", [False, True], ids=["plain", "markov"])
def test_launches_of_a_step(
    has_markov: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the default head, with the Markov term that `specformer train` gives it and without.

    The largest number of all steps.
    """
    kernels = use_triton(monkeypatch, _disable_current_modes)
    found: dict[str, Counter[str]] = {}

    def watch(phase: str) -> None:
        method = getattr(SpecFormerSpeculator, phase)

        def watched(self: SpecFormerSpeculator, *args: Any, **kwargs: Any) -> Any:
            before = kernels.copy()
            with Launches() as launches:
                result = method(self, *args, **kwargs)
            counted = launches.found + (kernels - before)
            found[phase] = max(counted, found.get(phase, counted), key=Counter.total)
            return result

        monkeypatch.setattr(SpecFormerSpeculator, phase, watched)

    watch("_stage")
    watch("_draft")
    watch("propose")
    markov = {"markov_rank": MARKOV_RANK, "markov_gate": True} if has_markov else {}
    head = make_head(tmp_path / "head", "default", **markov)
    with engine(drafting(K, head)) as llm:
        llm.generate(TEXTS[:3], greedy(6), use_tqdm=False)
    for phase, launches in found.items():
        print(f"{phase}: {launches.total()}: {dict(launches)}")
    assert found["_stage"].total() <= STAGE_LAUNCHES
    more = GATE_LAUNCHES + (K - 1) * SLOT_LAUNCHES if has_markov else 0
    assert found["_draft"].total() + found["_draft"][JOINED] <= DRAFT_LAUNCHES + more
    assert found["propose"].total() + found["propose"][JOINED] <= MOST_LAUNCHES + more
    assert found["_draft"]["_markov_bias_kernel"] == (K - 1 if has_markov else 0)
