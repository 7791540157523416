"""Train our head for so many cpu-seconds, by `specformer train` as it is.

    python -m peers.train_ours --seconds 240 --seed 0 --out DIR --data build/peers

Two things are replaced: the clock counts cpu-seconds, and the target's states come from the file
that the other heads read. Everything else is the command's own, defaults included, but for the
hooks and the size of a batch, which are the bundled pair's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from peers.answers import LONGEST, TRAINED
from peers.clock import CpuClock
from peers.plan import TARGET
from peers.target_states import Aside, TargetStates
from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.data.files import write_atomic
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import load_target
from vllm_specformer.training import train as training
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.packing import Batch, Batches
from vllm_specformer.training.result import Inputs
from vllm_specformer.training.rows import lay_out, parts_of
from vllm_specformer.training.run_directory import RunDirectory
from vllm_specformer.training.settings import TrainSettings
from vllm_specformer.training.states import TransformersStates
from vllm_specformer.training.texts import Texts

HOOKS = (0, 1, 2, 3, 4, 5, 6)
BATCH_TOKENS, ANCHORS = 1024, 48
MANY_STEPS = 1_000_000  # the clock ends it


class KeptStates(TransformersStates):
    """States of texts that are trained on come from the file."""

    def __init__(self, states: TargetStates, place: Path) -> None:
        super().__init__(states.target, place, 0)
        self.states = states
        self.batches: Batches

    def begin(self, batches: Batches) -> None:
        super().begin(batches)
        self.batches = batches

    def counts(self, steps: int) -> dict[str, int]:
        """Texts and tokens of so many steps, those before an interruption, too."""
        seen = [i for n in range(steps) for row in self.batches.batch(n) for i in row]
        return {"texts": len(seen), "tokens": int(self.states.texts.lengths[seen].sum())}

    def trained(self, number: int, batch: Batch, fields: dict[str, Tensor]) -> HookedRows:
        self.states.make(index for row in batch for index in row)
        ids = fields["input_ids"]
        kept = lay_out(self.states.of, batch, self.states.texts, ids.shape[1])
        parts = parts_of(kept, ids.device, torch.float32)
        return HookedRows([self.ends.embed(ids), *parts], self.ends.norm(parts[-1]), **fields)


class Parts:
    """What the training is given in place of its own: clock and states."""

    def __init__(self, data: Path) -> None:
        self.data, self.aside = data, Aside()
        self.clock: CpuClock
        self.states: KeptStates

    def put_in(self) -> None:
        training.open_states = self.open_states  # type: ignore[assignment]
        training.Clock = self.make_clock  # type: ignore[assignment,misc]

    def make_clock(self, limit: float | None, agree: Callable[[float], float]) -> CpuClock:
        self.clock = CpuClock(limit, self.aside)
        return self.clock

    @contextmanager
    def open_states(
        self,
        inputs: Inputs,
        config: SpecFormerConfig,
        texts: Texts,
        directory: RunDirectory,
        device: torch.device,
    ) -> Iterator[KeptStates]:
        model = load_target(inputs.directory, torch.float32, device)
        # The embedding is looked up; states behind all layers are kept.
        target = HookedTarget(model, HOOKS[1:])
        states = TargetStates(self.data / "states", target, texts, self.aside)
        self.states = KeptStates(states, directory.path)
        yield self.states


def settings(data: Path, out: Path, seconds: float, seed: int) -> TrainSettings:
    return TrainSettings(
        target=str(TARGET),
        data=(str(data / TRAINED),),
        out=str(out),
        hooks=HOOKS,
        max_hours=seconds / 3600,
        max_steps=MANY_STEPS,
        batch_tokens=BATCH_TOKENS,
        anchors_per_text=ANCHORS,
        max_length=LONGEST,
        eval_share=0.0,  # all heads are taken as they are in the end
        seed=seed,
        dtype="float32",
        device="cpu",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    parts, wall = Parts(args.data), time.time()
    parts.put_in()
    # It has its last name once it is counted, so that it can be told from one that was stopped.
    half = args.out.with_name(f".{args.out.name}.partial")
    if RunDirectory(half).complete:
        shutil.rmtree(half)
    place = training.train(settings(args.data, half, args.seconds, args.seed))
    steps = json.loads((place / "provenance.json").read_text())["result"]["steps"]
    about = parts.states.counts(steps) | {
        "steps": steps,
        "cpu_seconds": round(args.seconds * parts.clock.reached, 1),
        "states_cpu_seconds": round(parts.aside.seconds, 1),
        "wall_seconds": round(time.time() - wall, 1),
        "parameters": sum(t.numel() for t in load_file(place / "model.safetensors").values()),
        "answers": len(parts.states.states.texts),
    }
    write_atomic(place / "training.json", (json.dumps(about) + "\n").encode())
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(place, args.out)


if __name__ == "__main__":
    main()
