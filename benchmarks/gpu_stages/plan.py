"""What is run, in the order of its worth: every unit is one process with a result of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_stages.arms import (
    ARMS,
    BATCHES,
    CONTEXT,
    NODES,
    PAIR,
    PAIR_BATCHES,
    PAIR_CONTEXT,
    PUBLISHED,
    SHAPES,
    TREES,
    Arm,
    find,
)

STAGES = {
    "a": "environment",
    "b": "kernels",
    "c": "the bundled pair: output and acceptance",
    "d": "throughput against other methods",
    "e": "profile of a draft step",
}
# Of stage d on the first shape: those of the first call, and those worth more than what follows.
FIRST_ARMS, NEXT_ARMS = 3, 6
MAX_LENGTH = 4096
# Said outright, so that vLLM refuses what a runner cannot do instead of taking the other one.
V1, V2 = ({"VLLM_USE_V2_MODEL_RUNNER": choice} for choice in "01")
IN_PROCESS = V2 | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# What trees can have.
FLASH, HALF = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}, "in bfloat16"
# A dry run draws one small engine after another in the interpreter.
DRY_ENGINE = {
    "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One process.

    Attributes:
        name: of the result within its stage.
        module: of `gpu_stages`, whose `run` gets the options.
        expected: seconds, a guess; a call with too little time left does not start it.
        limit: seconds after which it is ended and counts as failed.
        on_v1: needs vLLM's V1 runner, which runs on a CPU without the interpreter.
    """

    stage: str
    name: str
    module: str
    options: dict[str, Any] = field(repr=False)
    expected: int = 60
    limit: int = 240
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    on_v1: bool = False


def units(dry: bool, results: Path, scratch: Path) -> list[Unit]:
    """All units; `scratch` is for checkpoints and traces.

    Those up to the first arms are what one call of eight minutes is to answer.
    """
    # All but the first shape in full, in a dry run: one shape of toy size.
    shapes = ("toy",) if dry else SHAPES
    first, *others = shapes
    throughput = [_throughput(first, arm, dry, scratch) for arm in ARMS]
    published = [_throughput(first, arm, dry, scratch) for arm in PUBLISHED]
    first_pairs, other_pairs, trees = _pair(dry)
    return [
        Unit("a", "machine", "environment", {}, 20, on_v1=True),
        *first_pairs,
        _kernels("correct", ["--check"], 60, dry, results),
        *throughput[:FIRST_ARMS],
        *other_pairs,
        *throughput[FIRST_ARMS:NEXT_ARMS],
        _profile(first, dry, scratch),
        _kernels("kernels", [], 150, dry, results),
        *throughput[NEXT_ARMS:],
        *published,
        *(_throughput(shape, arm, dry, scratch) for shape in others for arm in ARMS),
        *trees,
        *(_trees_clock(arm, dry) for arm in TREES),
    ]


def _kernels(name: str, more: list[str], expected: int, dry: bool, results: Path) -> Unit:
    arguments = ["--quick", *more]
    if dry:
        arguments += ["--op", "grouped_rms_norm", "--device", "cpu"]
    options = {"arguments": arguments, "stem": str(results / name)}
    return Unit("b", name, "kernels", options, expected, 420, on_v1=True)


def _pair(dry: bool) -> tuple[list[Unit], list[Unit], list[Unit]]:
    """Engines with and without graphs, drafts and coupled verification in float32, then trees.

    First those that show whether drafts are right and change no greedy text, then the others.
    Trees need FlashAttention, which has no float32, so they have a baseline of their own.
    """
    size = {"prompts": 6, "max_tokens": 8, "group": 2}
    full = {"prompts": 48, "max_tokens": 96, "group": 5}
    first, others, trees = list[Unit](), list[Unit](), list[Unit]()
    arms: dict[str, dict[str, Any] | None] = {
        "none": None,
        "specformer": {},
        "coupled": {"verification": "coupled", "draft_sample_method": "probabilistic"},
    }

    def unit(name: str, speculative: dict[str, Any] | None, mode: str, engine: Any) -> Unit:
        options: dict[str, Any] = (size if dry else full) | {
            "speculative": speculative,
            "engine": DRY_ENGINE if dry else engine,
            "dense": (3 if dry else 8) if name == "specformer" else 0,
        }
        return Unit("c", f"{name}, {mode}", "pair", options, 40, environment=IN_PROCESS)

    for mode in ("eager",) if dry else ("graphs", "eager"):
        eager = {"enforce_eager": mode == "eager"}
        for name, speculative in arms.items():
            made = unit(name, speculative, mode, {"dtype": "float32"} | eager)
            (others if name == "coupled" else first).append(made)
        if not dry:
            trees.append(unit("none", None, f"{mode} {HALF}", FLASH | eager))
        trees.append(unit("tree", _tree(dry), mode if dry else f"{mode} {HALF}", FLASH | eager))
    served = {"prompts": 6, "max_tokens": 12} if dry else {"prompts": 48, "max_tokens": 96}
    engine = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True} if dry else {}
    evaluated = served | {"num_speculative_tokens": 4, "engine": engine}
    others.append(Unit("c", "acceptance", "acceptance", evaluated, 90, on_v1=True))
    return first, others, trees


def _tree(dry: bool) -> dict[str, Any]:
    return {"num_speculative_tokens": 8, "tree_nodes": 5 if dry else NODES}


def _trees_clock(arm: Arm, dry: bool) -> Unit:
    """Steps of the pair with trees and without, at the engine's full length of answers."""
    options = {
        "shape": PAIR,
        "head": arm.head,
        "speculative": None if arm.head is None else _tree(dry),
        "num_speculative_tokens": arm.num_tokens,
        "batches": (1, 3) if dry else PAIR_BATCHES,
        "context": PAIR_CONTEXT,
        "steps": 3 if dry else 30,
        "engine": (DRY_ENGINE if dry else FLASH | {"max_model_len": 1024})
        | {"load_format": "auto"},
    }
    return Unit("d", f"{PAIR} {arm.name}", "throughput", options, 40, environment=V2)


def _throughput(shape: str, arm: Arm, dry: bool, scratch: Path) -> Unit:
    batches = (1, 3) if dry else BATCHES
    options = _serving(shape, arm, batches, dry, scratch) | {"steps": 3 if dry else 40}
    environment = V1 if arm.on_v1 else V2
    name = f"{shape} {arm.name}"
    return Unit("d", name, "throughput", options, 70, 300, environment, arm.on_v1)


def _profile(shape: str, dry: bool, scratch: Path) -> Unit:
    batches = (1, 3) if dry else (1, 64, 256)
    options = _serving(shape, find("specformer-k4"), batches, dry, scratch)
    options |= {"traced": 3 if dry else 6}
    return Unit("e", f"{shape} draft step", "draft_profile", options, 75, environment=V2)


def _serving(
    shape: str, arm: Arm, batches: tuple[int, ...], dry: bool, scratch: Path
) -> dict[str, Any]:
    return {
        "shape": shape,
        "head": arm.head,
        "num_speculative_tokens": arm.num_tokens,
        "acceptance_length": arm.length,
        "batches": batches,
        "context": 24 if dry else CONTEXT,
        "folder": str(scratch),
        "engine": DRY_ENGINE if dry else {"dtype": "bfloat16", "max_model_len": MAX_LENGTH},
    }
