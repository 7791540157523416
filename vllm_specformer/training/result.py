"""The result of a training: the head, where it came from, and what it was begun with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_specformer.data.files import sha256_of, write_atomic
from vllm_specformer.data.manifest import Manifest, TargetRecord
from vllm_specformer.environment import versions
from vllm_specformer.places import lasting
from vllm_specformer.training import report
from vllm_specformer.training.settings import PLACES, TrainSettings
from vllm_specformer.training.trainer import HeadTrainer


@dataclass(frozen=True)
class Inputs:
    """What a training is about, known before anything large is loaded."""

    settings: TrainSettings
    device: str
    dtype: str
    directory: Path
    target: TargetRecord
    manifest: Manifest
    processes: int

    @property
    def record(self) -> dict[str, Any]:
        """What a directory remembers, and what must be the same when a run is continued."""
        return {
            "settings": self.settings.model_dump(exclude=set(PLACES)),
            "target": self.target.fingerprint,
            "data": data_digest(self.manifest),
            "processes": self.processes,
            "device": self.device,
            "dtype": self.dtype,
        }


def write_result(
    inputs: Inputs, trainer: HeadTrainer, counts: dict[str, Any], seconds: float
) -> None:
    """Write the result beside the log; the provenance, written last, says that it is complete."""
    directory, history = trainer.directory, trainer.state.log_history
    best = directory.best_record()
    last = directory.path / ".last.partial"
    shutil.rmtree(last, ignore_errors=True)
    try:
        trainer.save_head(last)
        source = directory.best if best else last
        weights = {
            "sha256": sha256_of(source / "model.safetensors"),
            "sha256_of_last_step": sha256_of(last / "model.safetensors"),
        }
        for name in ("config.json", "model.safetensors"):
            write_atomic(directory.path / name, (source / name).read_bytes())
    finally:
        shutil.rmtree(last, ignore_errors=True)
    report.write_log(directory.log, history)
    report.write_table(directory.path, history)
    report.write_plot(directory.path, history)
    result = {
        "steps": trainer.state.global_step,
        "seconds_of_last_run": round(seconds, 1),
        "evaluation": best,
        "weights": weights,
    }
    provenance = _provenance(inputs, trainer, counts) | {"result": result}
    card = report.model_card(trainer.model.config, provenance)
    write_atomic(directory.path / "README.md", card.encode())
    write_atomic(directory.provenance, (json.dumps(provenance, indent=2) + "\n").encode())
    directory.clean_up()


def _provenance(inputs: Inputs, trainer: HeadTrainer, counts: dict[str, Any]) -> dict[str, Any]:
    counted = inputs.manifest.counts
    return {
        "target": inputs.target.model_dump(),
        "data": {
            "manifest_sha256": data_digest(inputs.manifest),
            "complete": inputs.manifest.complete,
            "conversations": counted.conversations,
            "answer_tokens": counted.answer_tokens,
            "sampled": counted.sampled,
        },
        "settings": inputs.settings.model_dump()
        | {name: lasting(getattr(inputs.settings, name)) for name in PLACES},
        "head": trainer.model.config.to_dict(),
        "texts": counts,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "processes": inputs.processes,
        "device": _device_name(inputs.device),
        "dtype": inputs.dtype,
        "packed": trainer.packed,
        "versions": versions(),
    }


def data_digest(manifest: Manifest) -> str:
    """Digest of what the data is: its settings and the hash of every shard."""
    content = manifest.model_dump(exclude={"versions"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
