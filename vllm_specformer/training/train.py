"""One training from settings to a servable head: `specformer train` without the command line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers.trainer_callback import PrinterCallback

from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.data.files import directory_lock
from vllm_specformer.data.manifest import read_manifest
from vllm_specformer.data.shards import read_shards
from vllm_specformer.environment import versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.pairing import check_weights
from vllm_specformer.places import check_target_name, lasting
from vllm_specformer.target.files import end_token_ids, find_target, target_record
from vllm_specformer.target.model import (
    head_config,
    read_target_config,
)
from vllm_specformer.training import report
from vllm_specformer.training.draft_vocabulary import choose_tokens, coverage, suggestion
from vllm_specformer.training.heldout import evaluation_budgets
from vllm_specformer.training.leaning_head import LeaningHead
from vllm_specformer.training.optimizers import cpu_has_bfloat16
from vllm_specformer.training.pace import Clock, Work
from vllm_specformer.training.packed_head import PackedHead
from vllm_specformer.training.packing import Batch, Batches, Budget, plan_all
from vllm_specformer.training.result import Inputs, about, write_json, write_result
from vllm_specformer.training.run_directory import RunDirectory, disk_errors
from vllm_specformer.training.settings import EVAL_TEXTS, TrainSettings
from vllm_specformer.training.start import config_of_start, start_flat, start_from
from vllm_specformer.training.states import States, open_states
from vllm_specformer.training.streamed_states import check_states
from vllm_specformer.training.texts import Texts, read_texts, split
from vllm_specformer.training.trainer import (
    HeadTrainer,
    default_eval_every,
    trainer_arguments,
)

_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_GPU_MEMORY, _CPU_MEMORY = 2048, 256
_FEW_STEPS = 300
_COUNTED = 500  # texts whose anchors tell how many a text has


def train(
    settings: TrainSettings, quiet: bool = False, stop: Callable[[], bool] = lambda: False
) -> Path:
    """Train a head, or continue where a killed run stopped; returns the directory of the head.

    Under torchrun every process calls it.

    Args:
        stop: asked after every step whether to write a checkpoint and end; a run of several
            processes cannot.

    Raises:
        SpecFormerError: anything the user can put right, before long work where possible.
        KeyboardInterrupt: `stop` said so.
    """
    if settings.init is not None:
        begun = read_head_config(settings.init)
        check_weights(settings.init, begun)
        settings = settings.with_slots(begun.num_draft_slots)
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
    manifests = tuple(
        read_manifest(Path(data), target.fingerprint, settings.partial_data)
        for data in settings.data
    )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" or cpu_has_bfloat16() else "float32"
    inputs = Inputs(settings, device, dtype, place, target, manifests, processes.num_processes)
    out = Path(settings.out)
    with directory_lock(out) if processes.is_main_process else nullcontext():
        directory = RunDirectory(out)
        if processes.is_main_process:
            for note in directory.begin(inputs.record, versions()):
                _say(f"note: {note}")
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
            _run(inputs, directory, processes, quiet, stop)
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


def _run(
    inputs: Inputs,
    directory: RunDirectory,
    processes: PartialState,
    quiet: bool,
    stop: Callable[[], bool],
) -> None:
    settings = inputs.settings
    target_config = read_target_config(inputs.directory)
    name = settings.target_name or lasting(settings.target)
    if settings.init is None:
        config = head_config(settings.preset, target_config, name, **settings.head_fields())
    else:
        config = config_of_start(settings.init, target_config, name, settings.shape_options())
    if settings.states != "transformers":
        check_states(settings.states, config, processes.num_processes)
    texts, trained, held_out = _read_texts(inputs, config.max_position_embeddings)
    with open_states(inputs, config, texts, directory, processes.device) as states:
        _train(inputs, config, states, texts, trained, held_out, directory, processes, quiet, stop)


def _train(
    inputs: Inputs,
    config: SpecFormerConfig,
    states: States,
    texts: Texts,
    trained: np.ndarray,
    held_out: np.ndarray,
    directory: RunDirectory,
    processes: PartialState,
    quiet: bool,
    stop: Callable[[], bool],
) -> None:
    settings, device, main = inputs.settings, processes.device, processes.is_main_process
    target = states.ends
    torch.manual_seed(settings.seed)
    leans = config.markov_gate and target.is_linear
    head = LeaningHead(config) if leans else PackedHead(config)
    if settings.init is not None:
        start_from(head, settings.init)
    vocabulary = head.draft_token_ids
    if vocabulary is not None and settings.init is None:
        vocabulary.copy_(_draft_vocabulary(inputs, config, texts, trained))
    if vocabulary is not None:
        target.score_only(vocabulary)
    packed = settings.batch_size is None and states.can_pack()
    batches = _batches(inputs, config, texts, trained, packed)
    states.begin(batches)
    work = _work(inputs, config, texts, trained, batches.steps, states.parameters)
    if settings.eval_texts is None and settings.max_hours is None:
        between = settings.eval_every or default_eval_every(batches.steps)
        held_out = held_out[: work.most_texts(between)]
    evaluated = _evaluation_batches(settings, texts, held_out, packed)
    counts: dict[str, Any] = {
        "read": inputs.counts.conversations,
        **texts.skipped,
        "trained_on": len(trained),
        "held_out": len(texts) - len(trained),
        "evaluated": len(held_out),
        "evaluated_greedy": bool(len(held_out)) and not texts.temperatures[held_out].any(),
    }
    if vocabulary is not None:
        judged = held_out if len(held_out) else trained
        counts["covered"] = coverage(texts, judged, vocabulary.numpy(), config.vocab_size)
    if main:
        longest = int(texts.lengths[trained].max())
        _introduce(settings, config, batches.steps, counts, packed, device, longest)
        if config.draft_vocab_size == 0 and settings.draft_vocab is None:
            for note in suggestion(texts, trained, config):
                _say(note)
    limit = settings.max_hours and settings.max_hours * 3600
    clock = Clock(limit, lambda number: _of_first(number, processes))
    steps_per_evaluation = len(held_out) * work.evaluated_text / work.step
    reporter = report.Reporter(
        directory, clock, settings, steps_per_evaluation if evaluated else 0.0, quiet, stop
    )
    default = _GPU_MEMORY if device.type == "cuda" else _CPU_MEMORY
    checkpoint = directory.last_checkpoint()
    if checkpoint is None and settings.init is None:
        start_flat(head, target)
    trainer = HeadTrainer(
        head,
        states,
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
        memory=(settings.memory or default) << 20,
        save_dtype=_save_dtype(read_target_config(inputs.directory)),
        clock=clock,
        callbacks=[reporter],
        quiet=quiet,
    )
    facts = about(inputs, trainer.served_head(), counts, packed, trainer.save_dtype)
    trainer.remove_callback(PrinterCallback)
    started = time.time()
    with disk_errors(directory.path, "log or result", directory.what_is_safe, directory.staging):
        if main:
            write_json(directory.about, facts)
        if stop():
            raise KeyboardInterrupt
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            reporter.close()
        if reporter.stopped:
            raise KeyboardInterrupt
        if main:
            state = trainer.state
            result = {
                "steps": state.global_step,
                "planned_steps": state.max_steps,
                "seconds_of_last_run": round(time.time() - started, 1),
            }
            head = trainer.served_head()
            write_result(directory, directory.path, head, facts, state.log_history, result)
            directory.clean_up()


def _of_first(number: float, processes: PartialState) -> float:
    """The first process's number, in all of them."""
    if processes.num_processes == 1:
        return number
    shared = torch.tensor([number], dtype=torch.float64, device=processes.device)
    torch.distributed.broadcast(shared, 0)
    return float(shared)


def _work(
    inputs: Inputs,
    config: SpecFormerConfig,
    texts: Texts,
    trained: np.ndarray,
    steps: int,
    target_parameters: int,
) -> Work:
    """What a step costs, and a text that is evaluated."""
    settings, lengths = inputs.settings, texts.lengths[trained]
    in_batch = settings.batch_size or max(1.0, settings.batch_tokens / lengths.mean())
    anchors = float(np.mean([len(texts.anchors(i)[0]) for i in trained[:_COUNTED].tolist()]))
    counts = settings.counts(config.nested_slots)
    return Work.of(
        config,
        target_parameters,
        tokens=float(lengths.mean()),
        texts=min(float(in_batch), len(trained)) * settings.accumulate * inputs.processes,
        anchors=anchors,
        trained_anchors=settings.anchors(inputs.device) or anchors,
        slots=sum(counts) / len(counts),
        scored=settings.sample(inputs.device) or config.num_scored_tokens,
        budgets=evaluation_budgets(config.num_draft_slots),
    )


def _read_texts(inputs: Inputs, positions: int) -> tuple[Texts, np.ndarray, np.ndarray]:
    """All texts, and the indices of those to train on and to evaluate."""
    settings = inputs.settings
    tables = (
        table
        for data, manifest in zip(settings.data, inputs.manifests, strict=True)
        for table in read_shards(Path(data), manifest)
    )
    texts = Texts.collect(read_texts(tables), min(settings.max_length, positions))
    most = settings.eval_texts or EVAL_TEXTS
    return texts, *split(texts, settings.eval_share, most)


def _batches(
    inputs: Inputs, config: SpecFormerConfig, texts: Texts, trained: np.ndarray, packed: bool
) -> Batches:
    settings = inputs.settings
    return Batches(
        texts,
        trained,
        Budget(settings.batch_tokens, settings.batch_size, packed),
        per_text=settings.anchors(inputs.device),
        slot_counts=settings.counts(config.nested_slots),
        seed=inputs.draw_seed,
        per_step=inputs.processes * settings.accumulate,
        steps=settings.max_steps,
        epochs=settings.epochs,
    )


def _draft_vocabulary(
    inputs: Inputs, config: SpecFormerConfig, texts: Texts, trained: np.ndarray
) -> torch.Tensor:
    """The tokens the head is to score, int64 [N]; held-out texts have no say in it."""
    ends = end_token_ids(inputs.directory)
    chosen = choose_tokens(texts, trained, config.draft_vocab_size, config.vocab_size, ends)
    return torch.from_numpy(chosen)


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
    longest: int,
) -> None:
    _say(
        f"{counts['read']:,} conversations: {counts['trained_on']:,} to train on, "
        f"{counts['held_out']:,} held out ({counts['evaluated']:,} of them evaluated), "
        f"{counts['cut']:,} cut at {settings.max_length:,} "
        f"tokens, {counts['without_anchor']:,} left out (no answer to learn from)"
    )
    if counts["evaluated"] and not counts["evaluated_greedy"]:
        _say("note: no held-out text is greedy; acceptance is measured on sampled ones")
    if settings.dtype == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        _say(
            "note: --dtype bfloat16: this processor only emulates it, many times slower than "
            "float32; leave the option out"
        )
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
    visible = config.context_window + config.context_sinks
    if config.context_window and visible >= longest:
        _say(
            f"note: no text is longer than {longest:,} tokens, so the head sees all of each; a "
            f"window of {config.context_window:,} has no effect in this training (--max-length, "
            "longer answers)"
        )
    _say(f"{steps:,} steps on {device.type}, {config.num_draft_slots} slots, {settings.optimizer}")
    if settings.max_steps is None and settings.init is None and steps < _FEW_STEPS:
        epochs = math.ceil(settings.epochs * _FEW_STEPS / steps)
        _say(
            f"note: a new head learns little in so few steps; --epochs {epochs} makes {_FEW_STEPS} "
            "of them, smaller batches or more answers help, too"
        )


def _say(line: str) -> None:
    print(line, flush=True)
