"""The Transformers Trainer with what a draft head needs beside it: a target, slots, acceptance.

Only the head is the Trainer's model. Loops, accumulation, data parallelism, mixed precision,
schedulers and the content of checkpoints are the Trainer's; this subclass hands it the loss, makes
its checkpoints appear whole, and evaluates by acceptance.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.heldout import Evaluation, evaluate
from vllm_specformer.training.hooked_rows import HookedRows
from vllm_specformer.training.optimizers import build_optimizer
from vllm_specformer.training.pace import EVALUATIONS, Clock, factor
from vllm_specformer.training.packed_head import Objective, PackedHead
from vllm_specformer.training.packing import Batch, Batches
from vllm_specformer.training.result import save_head
from vllm_specformer.training.run_directory import SERVED, RunDirectory, disk_errors
from vllm_specformer.training.settings import COSINE_FLOOR, DECAY_SHARE, REACH, TrainSettings
from vllm_specformer.training.states import States


class DivergedError(SpecFormerError):
    """The loss is no longer a number."""


def trainer_arguments(
    settings: TrainSettings,
    directory: RunDirectory,
    steps: int,
    *,
    device: str,
    bf16: bool,
    evaluate: bool,
) -> TrainingArguments:
    """The Trainer's own arguments. The run is one of its epochs, see `packing.Batches`."""
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "trapezoid": ("warmup_stable_decay", {"num_decay_steps": int(steps * DECAY_SHARE)}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": COSINE_FLOOR}),
        "linear": ("linear", {}),
        "constant": ("constant_with_warmup", {}),
    }
    shape, shape_arguments = shapes[settings.shape]
    eval_every = settings.eval_every or default_eval_every(steps)
    # By the clock, the reporter decides when.
    eval_steps = settings.max_hours is None or settings.eval_every is not None
    save_steps = settings.max_hours is None or settings.save_every is not None
    return TrainingArguments(
        output_dir=str(directory.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=settings.clip,
        lr_scheduler_type=shape,
        lr_scheduler_kwargs=shape_arguments,
        warmup_steps=int(steps * settings.warmup),
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate and eval_steps else "no",
        eval_steps=eval_every,
        save_strategy="steps" if save_steps else "no",
        save_steps=settings.save_every or eval_every,
        seed=settings.seed,
        bf16=bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        log_level="warning",
    )


def default_eval_every(steps: int) -> int:
    """Steps between evaluations, where nobody says otherwise."""
    return max(1, math.ceil(steps / EVALUATIONS))


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


class HeadTrainer(Trainer):
    """Trains a head beside its frozen target.

    Args:
        states: of the target, for `batches` and `held_out`.
        held_out: batches of the texts that are evaluated.
        save_dtype: of the weights that are served.
        clock: counts the run's time; with a limit it decides the learning rate, too.
        quiet: show no progress.
    """

    def __init__(
        self,
        head: PackedHead,
        states: States,
        batches: Batches,
        held_out: list[Batch],
        settings: TrainSettings,
        directory: RunDirectory,
        arguments: TrainingArguments,
        *,
        memory: int,
        save_dtype: torch.dtype,
        clock: Clock,
        callbacks: list[TrainerCallback],
        quiet: bool = False,
    ) -> None:
        self.states, self.settings, self.directory = states, settings, directory
        self.memory, self.save_dtype = memory, save_dtype
        self.texts, self.held_out = batches.texts, held_out
        self.clock, self.quiet = clock, quiet
        sample = settings.sample(arguments.device.type)
        by_reach = settings.slot_weights == REACH
        self.objective = Objective(settings.weights(), settings.mix, memory, sample, by_reach)
        self.loss_is_scaled_for_ga = False
        super().__init__(
            model=head,
            args=arguments,
            data_collator=_only,
            train_dataset=batches,
            eval_dataset=held_out,
            callbacks=callbacks,
        )
        self._reset_window()

    def _reset_window(self) -> None:
        self._since: float | None
        slots, device = self.settings.slots, self.args.device
        self._slot_sums = torch.zeros(2, slots, device=device)
        self._tokens, self._since = 0, None

    # --- what is trained ---

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        s = self.settings
        rates = (s.rate, s.vector_rate)
        optimizer = build_optimizer(model or self.model, s.optimizer, *rates, s.weight_decay)
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own; with a limit on the hours, one that follows steps and clock."""
        if self.clock.limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        reached = {-1: 0.0}  # step -> progress, asked for once per group of parameters

        def rate(step: int) -> float:
            if step not in reached:
                reached.clear()
                reached[step] = max(step / num_training_steps, self.clock.advance())
            return factor(self.settings.shape, reached[step], self.settings.warmup)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    def rows(self, fields: dict[str, Tensor], batch: Batch) -> HookedRows:
        """A batch of held-out texts with the target's states."""
        return self.states.held_out(batch, fields)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        slots, tokens, batch, number = (
            inputs.pop(name) for name in ("num_slots", "num_tokens", "texts", "number")
        )
        self._since = self._since or time.perf_counter()
        rows = self.states.trained(number, batch, inputs)
        loss, per_slot = model(rows, self.states.ends, slots, self.objective)
        known = per_slot.isfinite()
        self._slot_sums[0, :slots] += per_slot.nan_to_num(0.0, 0.0, 0.0)
        self._slot_sums[1, :slots] += known
        self._tokens += tokens
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # --- what is measured ---

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what concerns slots and speed; `epoch` and the closing summary are left out.

        Raises:
            DivergedError: the loss is not finite.
        """
        if "train_runtime" in logs:
            return
        step = self.state.global_step
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DivergedError(
                    f"step {step}: the loss is {logs['loss']}, the training has diverged",
                    f"lower --learning-rate (it is {self.settings.rate}) and use another --out",
                )
            logs |= self._window()
        logs |= {"hours": self.clock.seconds / 3600, "eval_hours": self.clock.evaluated / 3600}
        row = {"step": step} | {name: _rounded(value) for name, value in logs.items()}
        self.state.log_history.append(row)
        self.control: Any = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _window(self) -> dict[str, Any]:
        """Metrics since the last line of the log, over all processes."""
        tokens = torch.tensor(float(self._tokens), device=self.args.device)
        sums = self.accelerator.reduce(torch.cat([self._slot_sums.flatten(), tokens[None]]))
        losses = (sums[: self.settings.slots] / sums[self.settings.slots : -1]).tolist()
        seconds = time.perf_counter() - (self._since or 0.0)
        metrics = {"slot_losses": losses, "tokens_per_second": float(sums[-1]) / seconds}
        self._reset_window()
        return metrics

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Acceptance on the held-out texts; keeps the head if it is the best so far."""
        if not self.held_out:
            return {}
        started = time.perf_counter()
        own = self.held_out[self.args.process_index :: self.args.world_size]
        count = sum(len(row) for batch in own for row in batch)
        shown = tqdm(
            own,
            desc=f"evaluating {count} held-out texts",
            unit="batch",
            leave=False,
            disable=self.quiet or not self.is_world_process_zero(),
        )
        self.model.eval()
        with self.accelerator.autocast():
            result = evaluate(
                self.served_head(),
                self.states.ends,
                self.texts,
                shown,
                self.rows,
                self.memory,
            )
        result.set_from(self.accelerator.reduce(result.to_tensor().to(self.args.device)).cpu())
        self.model.train()
        self.clock.evaluation_took(time.perf_counter() - started)
        metrics = summary(result)
        self.log({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self.is_world_process_zero():
            self._keep_if_best({"step": self.state.global_step, **metrics})
        if self._since is not None:  # its time is not the training's
            self._since += time.perf_counter() - started
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def _keep_if_best(self, metrics: dict[str, Any]) -> None:
        """On a tie the earlier head stays, so a repeated stretch of a run changes nothing."""
        best = self.directory.best_record()
        if best is None or metrics["tokens_per_step"] > best["tokens_per_step"]:
            place, half = self.directory.path, self.directory.best_staging
            safe = self.directory.what_is_safe
            with disk_errors(place, "the best head so far", safe, half):
                self.directory.keep_best(self.save_head, metrics)

    # --- what is written ---

    def save_head(self, path: Path) -> None:
        """Write the head as it is served: configuration and weights in `save_dtype`."""
        save_head(self.served_head(), self.save_dtype, path)

    def served_head(self) -> PackedHead:
        return self.model.merged(self.states.ends)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.directory.staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write into a staging directory, and rename that when it is complete."""
        what = f"the checkpoint of step {self.state.global_step}"
        main = self.is_world_process_zero()
        place, half = self.directory.path, self.directory.staging
        with disk_errors(place, what, self.directory.what_is_safe, half):
            if main:
                self.directory.clear_staging()
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                self.directory.publish_checkpoint()
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Configuration and weights alone: the Trainer would pickle its arguments beside them.

        And the head as it is served, of which `specformer train --finish` makes a result.
        """
        assert output_dir is not None
        self.model.save_pretrained(output_dir, state_dict=state_dict)
        self.save_head(Path(output_dir, SERVED))


def summary(result: Evaluation) -> dict[str, Any]:
    """The metrics of an evaluation: tokens per step by number of drafted tokens, and per slot."""
    first, last = min(result.budgets), max(result.budgets)
    return {
        "tokens_per_step": _rounded(result.acceptance[first].tokens_per_step),
        "tokens_per_step_by_drafts": {
            str(k): _rounded(a.tokens_per_step) for k, a in result.acceptance.items()
        },
        "acceptance_per_position": _rounded(result.acceptance[last].per_position),
        "slot_losses": _rounded(result.slot_losses),
    }


def _rounded(value: Any) -> Any:
    """Metrics as they are written; what is no number becomes null, as JSON has no NaN."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
