"""One training from settings to a servable head: `specformer train` without the command line."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers.trainer_callback import PrinterCallback

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.data.files import directory_lock
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.environment import versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.places import check_target_name, lasting
from vllm_specformer.target.files import end_token_ids, find_target, target_record
from vllm_specformer.target.hidden_states import HookedTarget
from vllm_specformer.target.model import (
    can_pack,
    check_parts,
    head_config,
    load_target,
    read_target_config,
)
from vllm_specformer.training import report
from vllm_specformer.training.draft_vocabulary import choose_tokens, coverage
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.packing import Batch, Batches, Budget, plan_all
from vllm_specformer.training.result import Inputs, write_result
from vllm_specformer.training.run_directory import RunDirectory, disk_errors
from vllm_specformer.training.settings import TrainSettings
from vllm_specformer.training.texts import Texts, read_texts, split
from vllm_specformer.training.trainer import HeadTrainer, trainer_arguments

_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_GPU_MEMORY, _CPU_MEMORY = 2048, 256


def train(settings: TrainSettings, quiet: bool = False) -> Path:
    """Train a head, or continue where a killed run stopped; returns the directory of the head.

    Under torchrun every process calls it.

    Raises:
        SpecFormerError: anything the user can put right, before long work where possible.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecFormerError(
            "--device cuda: PyTorch sees no GPU", "check the driver and its build"
        )
    for variable in _SHARDING:
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise SpecFormerError(
                f"{variable}={os.environ[variable]}: heads are not sharded, as every process holds "
                "the whole target, which is larger",
                "unset it or start with torchrun alone",
            )
    if settings.target_name is not None:
        check_target_name(settings.target_name, Path(settings.out))
    processes = PartialState(cpu=device == "cpu")
    place, commit = find_target(settings.target, settings.revision)
    target = target_record(settings.target, place, commit)
    manifest = read_manifest(Path(settings.data), target.fingerprint, settings.partial_data)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    inputs = Inputs(settings, device, dtype, place, target, manifest, processes.num_processes)
    out = Path(settings.out)
    with directory_lock(out) if processes.is_main_process else nullcontext():
        directory = RunDirectory(out)
        if processes.is_main_process:
            changed = directory.begin(inputs.record, versions())
            if changed:
                _say(f"note: versions changed since the run began: {', '.join(changed)}")
        processes.wait_for_everyone()
        if directory.complete:
            if processes.is_main_process:
                directory.clean_up()
                _say(f"{out} is complete: nothing to do")
            _leave(processes)
            return out
        if not processes.is_main_process:
            transformers.utils.logging.disable_progress_bar()
        try:
            _run(inputs, directory, processes.is_main_process, quiet)
        except torch.OutOfMemoryError as error:
            raise SpecFormerError(
                f"out of GPU memory ({str(error).splitlines()[0]})",
                "lower --memory (logits and slots), --batch-tokens or --max-length",
            ) from None
        if processes.is_main_process:
            _say(f"{out} holds the head; README.md says how it did and how to serve it")
    _leave(processes)
    return out


def _leave(processes: PartialState) -> None:
    """Wait for the others and close the group: its threads must not outlive the interpreter."""
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()


def _run(inputs: Inputs, directory: RunDirectory, main: bool, quiet: bool) -> None:
    settings, device = inputs.settings, PartialState().device
    target_config = read_target_config(inputs.directory)
    name = settings.target_name or lasting(settings.target)
    config = head_config(settings.preset, target_config, name, **settings.head_fields())
    texts, trained, held_out = _read_texts(inputs, config.max_position_embeddings)

    model = load_target(inputs.directory, _DTYPES[inputs.dtype], device)
    transformers.utils.logging.disable_progress_bar()  # one bar is enough from here on
    target = HookedTarget(model, config.aux_hidden_state_layer_ids)
    check_parts(target, settings.target)
    vocabulary = _draft_vocabulary(inputs, config, texts, trained)
    if vocabulary is not None:
        target.score_only(vocabulary)
    packed = settings.batch_size is None and can_pack(target)
    batches = _batches(inputs, config, texts, trained, packed)
    evaluated = _evaluation_batches(settings, texts, held_out, packed)
    counts: dict[str, Any] = {
        "read": inputs.manifest.counts.conversations,
        **texts.skipped,
        "trained_on": len(trained),
        "evaluated": len(held_out),
        "evaluated_greedy": bool(len(held_out)) and not texts.temperatures[held_out].any(),
    }
    if vocabulary is not None:
        judged = held_out if len(held_out) else trained
        counts["covered"] = coverage(texts, judged, vocabulary.numpy(), config.vocab_size)
    if main:
        _introduce(settings, config, batches.steps, counts, packed, device)
    torch.manual_seed(settings.seed)
    reporter = report.Reporter(directory, quiet)
    default = _GPU_MEMORY if device.type == "cuda" else _CPU_MEMORY
    trainer = HeadTrainer(
        _new_head(config, vocabulary),
        target,
        batches,
        evaluated,
        settings,
        directory,
        trainer_arguments(
            settings,
            directory,
            batches.steps,
            device=inputs.device,
            bf16=inputs.dtype == "bfloat16",
            evaluate=bool(evaluated),
        ),
        packed=packed,
        memory=(settings.memory or default) << 20,
        save_dtype=_save_dtype(target_config),
        callbacks=[reporter],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    checkpoint = directory.last_checkpoint()
    with disk_errors(directory.path, "log or result", trainer.what_is_safe, directory.staging):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            reporter.close()
        if main:
            write_result(inputs, trainer, counts, time.time() - started)


def _read_texts(inputs: Inputs, positions: int) -> tuple[Texts, np.ndarray, np.ndarray]:
    """All texts, and the indices of those to train on and to evaluate."""
    settings = inputs.settings
    tables = read_shards(Path(settings.data), inputs.manifest)
    texts = Texts.collect(read_texts(tables), min(settings.max_length, positions))
    return texts, *split(texts, settings.eval_share, settings.eval_texts, settings.seed)


def _batches(
    inputs: Inputs, config: SpecFormerConfig, texts: Texts, trained: np.ndarray, packed: bool
) -> Batches:
    settings = inputs.settings
    return Batches(
        texts,
        trained,
        Budget(settings.batch_tokens, settings.batch_size, packed),
        per_text=settings.anchors_per_text,
        slot_counts=settings.counts(config.nested_slots),
        seed=settings.seed,
        per_step=inputs.processes * settings.accumulate,
        steps=settings.max_steps,
        epochs=settings.epochs,
    )


def _draft_vocabulary(
    inputs: Inputs, config: SpecFormerConfig, texts: Texts, trained: np.ndarray
) -> torch.Tensor | None:
    """The tokens the head is to score, int64 [N], if not all; held-out texts have no say in it."""
    if not config.draft_vocab_size:
        return None
    ends = end_token_ids(inputs.directory)
    chosen = choose_tokens(texts, trained, config.draft_vocab_size, config.vocab_size, ends)
    return torch.from_numpy(chosen)


def _new_head(config: SpecFormerConfig, vocabulary: torch.Tensor | None) -> PackedHead:
    head = PackedHead(config)
    if head.draft_token_ids is not None and vocabulary is not None:
        head.draft_token_ids.copy_(vocabulary)
    return head


def _evaluation_batches(
    settings: TrainSettings, texts: Texts, held_out: np.ndarray, packed: bool
) -> list[Batch]:
    plan = plan_all(texts.lengths[held_out], Budget(settings.batch_tokens, packed=packed))
    return [[[int(held_out[i]) for i in row] for row in batch] for batch in plan]


def _save_dtype(target: transformers.PreTrainedConfig) -> torch.dtype:
    """Heads are served in the precision that the target's weights have."""
    dtype = target.dtype or target.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _introduce(
    settings: TrainSettings,
    config: SpecFormerConfig,
    steps: int,
    counts: dict[str, Any],
    packed: bool,
    device: torch.device,
) -> None:
    _say(
        f"{counts['read']:,} conversations: {counts['trained_on']:,} to train on, "
        f"{counts['evaluated']:,} evaluated, {counts['cut']:,} cut at {settings.max_length:,} "
        f"tokens, {counts['without_anchor']:,} left out (no answer to learn from)"
    )
    if counts["evaluated"] and not counts["evaluated_greedy"]:
        _say("note: no held-out text is greedy; acceptance is measured on sampled ones")
    if config.draft_vocab_size:
        _say(
            f"the {config.draft_vocab_size:,} tokens of the draft vocabulary make up "
            f"{counts['covered']:.1%} of the answers it is judged by"
        )
    if settings.batch_size is None and not packed:
        _say(
            "note: this target does not keep texts apart that share a row; texts of similar length "
            "are padded instead"
        )
    _say(f"{steps:,} steps on {device.type}, {config.num_draft_slots} slots, {settings.optimizer}")


def _say(line: str) -> None:
    print(line, flush=True)
