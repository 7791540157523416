"""The result of a training: the head, where it came from, and what it was begun with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_specformer.data.files import directory_lock, sha256_of, write_atomic
from vllm_specformer.data.manifest import Counts, Manifest, TargetRecord
from vllm_specformer.environment import versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.head import SpecFormerHead
from vllm_specformer.places import lasting
from vllm_specformer.training import report
from vllm_specformer.training.run_directory import SERVED, RunDirectory
from vllm_specformer.training.settings import OF_SPEED, PLACES, TrainSettings


@dataclass(frozen=True)
class Inputs:
    """What a training is about, known before anything large is loaded."""

    settings: TrainSettings
    device: str
    dtype: str
    directory: Path
    target: TargetRecord
    manifests: tuple[Manifest, ...]
    processes: int

    @property
    def record(self) -> dict[str, Any]:
        """What a directory remembers, and what must be the same when a run is continued."""
        return {
            "settings": self.settings.model_dump(exclude={*PLACES, *OF_SPEED})
            | {"states": self.settings.source},
            "init": self.init_digest,
            "sample_vocab": self.settings.sample(self.device),
            "target": self.target.fingerprint,
            "data": data_digest(*self.manifests),
            "processes": self.processes,
            "device": self.device,
            "dtype": self.dtype,
        }

    @cached_property
    def init_digest(self) -> str | None:
        """Of the weights that the run begins with, if they are another head's."""
        init = self.settings.init
        return None if init is None else sha256_of(init / "model.safetensors")

    @property
    def draw_seed(self) -> int:
        """Decides the order of the texts, and what each step draws.

        It differs from run to run in a chain of `--init`, so that a short run does not begin with
        the texts of the one before; which texts are held out depends on `--seed` alone.
        """
        seed = self.settings.seed
        return seed if self.init_digest is None else seed + int(self.init_digest[:12], 16)

    @property
    def counts(self) -> Counts:
        """Of all directories of answers."""
        return Counts.of(shard for manifest in self.manifests for shard in manifest.shards)


def save_head(head: SpecFormerHead, dtype: torch.dtype, path: Path) -> None:
    """Write a head as it is served: configuration, and weights in `dtype`."""

    def served(value: Tensor) -> Tensor:
        value = value.detach().cpu()
        return value.to(dtype) if value.is_floating_point() else value

    with torch.device("meta"):
        plain = SpecFormerHead(head.config)
    plain.load_state_dict({n: served(v) for n, v in head.state_dict().items()}, assign=True)
    plain.save_pretrained(path)


def write_result(
    directory: RunDirectory,
    out: Path,
    head: SpecFormerHead,
    about: dict[str, Any],
    history: report.History,
    result: dict[str, Any],
) -> None:
    """Write a head and all that is told of it to `out`; the provenance, written last, says that it
    is complete.

    Args:
        directory: of the run; its best head is taken, else `head`, which is that of the last step.
        about: see `about`.
        result: what the provenance is to say of the result beside weights and evaluation.
    """
    best = directory.best_record()
    last = out / ".last.partial"
    shutil.rmtree(last, ignore_errors=True)
    try:
        save_head(head, getattr(torch, about["saved_as"]), last)
        source = directory.best if best else last
        weights = {
            "sha256": sha256_of(source / "model.safetensors"),
            "sha256_of_last_step": sha256_of(last / "model.safetensors"),
        }
        for name in ("config.json", "model.safetensors"):
            write_atomic(out / name, (source / name).read_bytes())
    finally:
        shutil.rmtree(last, ignore_errors=True)
    report.write_log(out / directory.log.name, history)
    report.write_table(out, history)
    report.write_plot(out, history)
    provenance = about | {"result": result | {"evaluation": best, "weights": weights}}
    card = report.model_card(head.config, provenance)
    write_atomic(out / "README.md", card.encode())
    write_json(out / directory.provenance.name, provenance)


def finish(run: Path, out: Path) -> Path:
    """Make a head of an interrupted run: the best that was evaluated, else the last checkpoint.

    Args:
        run: directory of the run. If it is `out`, too, it is complete then and cannot be continued.
        out: where the head goes.

    Raises:
        SpecFormerError: the directory holds no run, the run is going on or has no checkpoint yet.
    """
    directory = RunDirectory(run)
    if not (run / "run.json").is_file():
        raise SpecFormerError(
            f"--finish {run}: no run.json in it", "name the --out of a training that was begun"
        )
    with directory_lock(run), directory_lock(out):
        if directory.complete:
            raise SpecFormerError(
                f"--finish {run}: the run is complete", "its directory is the head"
            )
        checkpoint = directory.last_checkpoint()
        is_told = directory.about.is_file()
        if checkpoint is None or not (is_told and (checkpoint / SERVED).is_dir()):
            raise SpecFormerError(
                f"--finish {run}: it has no checkpoint of this version yet",
                "give the command it was begun with again, and it continues",
            )
        if out != run and any(not path.name.startswith(".") for path in out.iterdir()):
            raise SpecFormerError(f"--out {out}: is not empty", "choose a new directory")
        about = json.loads(directory.about.read_text())
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        result = {
            "steps": state["global_step"],
            "planned_steps": state["max_steps"],
            "seconds_of_last_run": None,
        }
        head = SpecFormerHead.from_pretrained(checkpoint / SERVED, dtype=torch.float32)
        write_result(directory, out, head, about, state["log_history"], result)
        if out == run:
            directory.clean_up()
    return out


def about(
    inputs: Inputs, head: SpecFormerHead, counts: dict[str, Any], packed: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """What is known of a result before the training: all of its provenance but the result itself.

    Args:
        counts: of texts.
        dtype: of the weights that are served.
    """
    counted, settings = inputs.counts, inputs.settings
    places: dict[str, Any] = {
        "target": lasting(settings.target),
        "data": [lasting(d) for d in settings.data],
        "init": settings.init and lasting(settings.init),
    }
    return {
        "target": inputs.target.model_dump(),
        "data": {
            "manifest_sha256": data_digest(*inputs.manifests),
            "manifests": [data_digest(manifest) for manifest in inputs.manifests],
            "complete": all(manifest.complete for manifest in inputs.manifests),
            "conversations": counted.conversations,
            "answer_tokens": counted.answer_tokens,
            "sampled": counted.sampled,
        },
        "settings": settings.model_dump(exclude={"out", "finish", "served_model"})
        | places
        | {"states": settings.source}
        | {"anchors_per_text": settings.anchors(inputs.device) or "all"}
        | {"learning_rate": settings.rate, "vector_learning_rate": settings.vector_rate}
        | {"sample_vocab": settings.sample(inputs.device)},
        "head": head.config.to_dict(),
        "texts": counts,
        "parameters": sum(p.numel() for p in head.parameters()),
        "processes": inputs.processes,
        "device": _device_name(inputs.device),
        "dtype": inputs.dtype,
        "saved_as": str(dtype).removeprefix("torch."),
        "packed": packed,
        "versions": versions(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def data_digest(*manifests: Manifest) -> str:
    """Digest of what the data is: settings and the hash of every shard, directory by directory."""
    contents = [
        json.dumps(manifest.model_dump(exclude={"versions"}), sort_keys=True)
        for manifest in manifests
    ]
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
