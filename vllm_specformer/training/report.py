"""What a training leaves for people: log, curves, provenance and a model card."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from vllm_specformer.config import SpecFormerConfig
from vllm_specformer.data.files import write_atomic
from vllm_specformer.training.pace import (
    BETWEEN_CHECKPOINTS,
    EVALUATIONS,
    FORECAST_AFTER,
    Clock,
    forecast,
)
from vllm_specformer.training.run_directory import RunDirectory
from vllm_specformer.training.settings import TrainSettings

History = list[dict[str, Any]]
_WIDTH = 98
_SECONDS_BETWEEN_PLOTS = 30.0
_SECONDS_BETWEEN_BARS = 0.1, 30.0  # on a terminal, and in a file


class Reporter(TrainerCallback):
    """Writes log and curves while the head trains, shows a progress bar, and ends a run in time.

    The log is made from the Trainer's history, which its checkpoints carry, so after a kill it
    shows every step once.

    Args:
        clock: with a limit on the hours it decides when to evaluate, to save and to end.
        steps_per_evaluation: training steps that take as long as an evaluation; 0: none is made.
        stop: whether to write a checkpoint and end after this step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        clock: Clock,
        settings: TrainSettings,
        steps_per_evaluation: float,
        quiet: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.directory, self.clock, self.quiet, self.stop = directory, clock, quiet, stop
        self.own_evaluations = settings.max_hours is not None and settings.eval_every is None
        self.own_checkpoints = settings.max_hours is not None and settings.save_every is None
        self.steps_per_evaluation = steps_per_evaluation
        self.bar: tqdm | None = None
        self.stopped = False
        self._drawn = self._saved = time.monotonic()
        self._timed: tuple[int, float] | None = None  # step, and seconds that were training's
        self._foretold = False
        self._tenths = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.log_history[-1] if state.log_history else {}
        before, evaluated = last.get("hours", 0.0) * 3600, last.get("eval_hours", 0.0) * 3600
        self.clock.start(before, evaluated)
        self._tenths = int(EVALUATIONS * self.clock.advance())
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                disable=self.quiet,
                mininterval=_SECONDS_BETWEEN_BARS[not sys.stderr.isatty()],
            )
            write_log(self.directory.log, state.log_history)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps or self.clock.over
        if self.clock.limit is not None:
            self._follow_clock(state, control, last)
        if not last and args.world_size == 1 and self.stop():
            self.stopped = control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        # Metrics of a window that a checkpoint cuts in two would be lost with a kill.
        control.should_log = control.should_log or control.should_save or last
        control.should_evaluate = control.should_evaluate or last
        if self.bar is not None:
            if self.clock.reached > 0:  # so that the bar's end is the end in time
                self.bar.total = min(
                    state.max_steps, math.ceil(state.global_step / self.clock.reached)
                )
            self.bar.update()
        self._foretell(state)

    def _follow_clock(self, state: Any, control: Any, last: bool) -> None:
        if last:
            control.should_training_stop = control.should_save = True
            return
        tenths = int(EVALUATIONS * self.clock.reached)
        if self.own_evaluations and self.steps_per_evaluation and tenths > self._tenths:
            self._tenths = tenths
            expected = self._seconds_per_step(state) * self.steps_per_evaluation
            control.should_evaluate = self.clock.may_evaluate(expected)
        # All processes save in the same step.
        since = self.clock.agree(time.monotonic() - self._saved)
        if self.own_checkpoints and since > BETWEEN_CHECKPOINTS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def _seconds_per_step(self, state: Any) -> float:
        """Of this part of the run, without its first step, evaluations left out; 0: unknown."""
        if self._timed is None:
            return 0.0
        step, began = self._timed
        spent = self.clock.seconds - self.clock.evaluated - began
        return spent / max(1, state.global_step - step)

    def _foretell(self, state: Any) -> None:
        """Say once, when it can be told, how long the run will take."""
        if self._timed is None:  # behind the first step, which is slower than the others
            self._timed = state.global_step, self.clock.seconds - self.clock.evaluated
            return
        spent = self.clock.seconds - self.clock.evaluated - self._timed[1]
        left = state.max_steps - state.global_step
        if self._foretold or self.bar is None or spent < FORECAST_AFTER or not left:
            return
        self._foretold = True
        per_step = self._seconds_per_step(state)
        evaluates = self.steps_per_evaluation > 0
        line = forecast(state.global_step, state.max_steps, per_step, self.clock, evaluates)
        if not self.quiet:
            tqdm.write(line)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        row = state.log_history[-1]
        with self.directory.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" in row:
            speed = f"{row['tokens_per_second']:,.0f}"
            self.bar.set_postfix({"loss": f"{row['loss']:.3f}", "tokens/s": speed})
        elif not self.quiet:
            tqdm.write(_in_words(row))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is None:
            return
        write_table(self.directory.path, state.log_history)
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_PLOTS:
            write_plot(self.directory.path, state.log_history)
            self._drawn = time.monotonic()

    def close(self) -> None:
        """End the line of the progress bar."""
        if self.bar is not None:
            self.bar.close()


def _in_words(row: dict[str, Any]) -> str:
    by_drafts = row["eval_tokens_per_step_by_drafts"].items()
    steps = ", ".join(f"{value:.2f} at K={k}" for k, value in by_drafts)
    accepted = " ".join(f"{x:.2f}" for x in row["eval_acceptance_per_position"])
    return f"step {row['step']}: tokens per step {steps}; accepted per position {accepted}"


def write_log(path: Path, history: History) -> None:
    """The whole log anew, a JSON object per line."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in history).encode())


def write_table(directory: Path, history: History) -> None:
    """`log.csv`, one line per logged step with lists spread over columns."""
    write_atomic(directory / "log.csv", as_csv(history).encode())


def write_plot(directory: Path, history: History) -> None:
    """`training.png`; drawing takes about half a second."""
    write_atomic(directory / "training.png", plot(history))


def as_csv(history: History) -> str:
    """The log as a table; an evaluation stands in the line of its step."""
    lines: dict[int, dict[str, Any]] = {}
    for row in history:
        line = lines.setdefault(row["step"], {})
        for name, value in row.items():
            if isinstance(value, list):
                line |= {f"{name}_{i}": item for i, item in enumerate(value)}
            elif isinstance(value, dict):
                line |= {f"{name}_{key}": item for key, item in value.items()}
            else:
                line[name] = value
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    return text.getvalue()


def plot(history: History) -> bytes:
    """Loss per slot, tokens per step and acceptance per position over the steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, steps, accepted = figure.subplots(1, 3)
    trained = [row for row in history if "loss" in row]
    evaluated = [row for row in history if "eval_tokens_per_step" in row]
    _curves(losses, trained, "slot_losses", "slot {}", "cross entropy, nats")
    for drafts in evaluated[0]["eval_tokens_per_step_by_drafts"] if evaluated else ():
        values = [row["eval_tokens_per_step_by_drafts"][drafts] for row in evaluated]
        steps.plot([row["step"] for row in evaluated], values, label=f"K={drafts}", marker=".")
    steps.set(xlabel="step", ylabel="tokens per step, held out")
    _curves(accepted, evaluated, "eval_acceptance_per_position", "{}", "accepted, held out")
    for axes in (losses, steps, accepted):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=7, ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def _curves(axes: Any, rows: History, field: str, label: str, title: str) -> None:
    for index in range(len(rows[0][field]) if rows else 0):
        values = [math.nan if row[field][index] is None else row[field][index] for row in rows]
        axes.plot([row["step"] for row in rows], values, label=label.format(index))
    axes.set(xlabel="step", ylabel=title)


def model_card(config: SpecFormerConfig, provenance: dict[str, Any]) -> str:
    """README.md of the head, in Markdown with the hub's metadata."""
    target, name = provenance["target"], config.target_name_or_path
    speculation = {
        "method": "specformer",
        "model": "HEAD",
        "num_speculative_tokens": min(4, config.num_draft_slots),
    }
    about = (
        f"A draft head for speculative decoding in vLLM with the plugin vllm-specformer: "
        f"{kind_of_head(config)}; {provenance['parameters']:,} parameters. It drafts K tokens in "
        "one pass. vLLM verifies every draft, so the output stays the target's own. The head was "
        f"trained for this target (fingerprint `{target['fingerprint'][:16]}`). It fits only "
        "targets of the same shape, and other weights accept fewer of its drafts."
    )
    return f"""---
base_model: {name}
library_name: vllm
tags: [speculative-decoding, specformer, vllm-specformer]
---
# SpecFormer head of {name}

{_filled(about)}

```bash
vllm serve {name} --speculative-config '{json.dumps(speculation)}'
```

## How it was trained
{_training(provenance)}

## Figures
{_metrics(provenance)}
Acceptance depends on the prompts: measure it on your own before you rely on these figures.
"""


def _filled(text: str, **options: Any) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False, break_long_words=False, **options)


def kind_of_head(config: SpecFormerConfig) -> str:
    """The choices that make a head, in words."""
    parts = [
        f"{config.num_draft_slots} draft slots",
        f"hooks at {list(config.aux_hidden_state_layer_ids)}",
        f'"{config.slot_mask}" mask',
        "bonus-token embedding" if config.use_bonus_embedding else "blind to the bonus token",
    ]
    if config.num_slot_layers > 1:
        parts.insert(1, f"{config.num_slot_layers} slot layers")
    if config.context_window:
        sinks = f" and the first {config.context_sinks:,}" if config.context_sinks else ""
        parts.append(f"seeing the last {config.context_window:,} tokens{sinks}")
    if config.markov_rank:
        gated = "gated " if config.markov_gate else ""
        parts.append(f"{gated}Markov term of rank {config.markov_rank}")
    if config.draft_vocab_size:
        parts.append(
            f"a draft vocabulary of {config.draft_vocab_size:,} of the target's "
            f"{config.vocab_size:,} tokens"
        )
    return ", ".join(parts)


def _training(provenance: dict[str, Any]) -> str:
    settings, data = provenance["settings"], provenance["data"]
    sampled = data["sampled"] / max(1, data["conversations"])
    batches = provenance["processes"] * settings["accumulate"]
    size = f"up to {settings['batch_tokens']:,} tokens"
    if settings["batch_size"]:
        size = f"{settings['batch_size']} texts"
    texts, result = provenance["texts"], provenance["result"]
    planned = result.get("planned_steps", result["steps"])
    early = ""
    if planned > result["steps"]:
        limit = settings.get("max_hours")
        why = f"as many as fitted into {limit:g} hours" if limit else "the run was ended early"
        early = f" of {planned:,} planned ({why})"
    items = {
        "Data": f"{data['conversations']:,} conversations whose answers ({data['answer_tokens']:,} "
        f"tokens) the target itself wrote (self-distillation), {sampled:.0%} of them sampled, the "
        f"rest greedy; {texts['trained_on']:,} were trained on, cut at "
        f"{settings['max_length']:,} tokens.",
        "Steps": f"{result['steps']:,}{early}, each of {batches} x {size}, "
        f"{settings['anchors_per_text']} anchors per text; {settings['optimizer']}, "
        f"{provenance['dtype']}, seed {settings['seed']}.",
        "Package": f"vllm-specformer {provenance['versions']['vllm-specformer']}. "
        "`provenance.json` has all settings, versions and hashes, `log.csv` and `training.png` "
        "the curves.",
    }
    if "covered" in texts:
        judged = "held-out" if texts["evaluated"] else "same"
        items["Draft vocabulary"] = (
            "the most frequent tokens of the answers trained on; they make up "
            f"{texts['covered']:.1%} of the {judged} answers. Other tokens cannot be drafted."
        )
    return "\n".join(
        _filled(f"- **{name}**: {text}", subsequent_indent="  ") for name, text in items.items()
    )


def _metrics(provenance: dict[str, Any]) -> str:
    best, texts = provenance["result"]["evaluation"], provenance["texts"]
    if best is None:
        return "No answers were held out (`--eval-share 0`), so acceptance was not measured.\n"
    kind = "greedy" if texts["evaluated_greedy"] else "sampled"
    rows = "\n".join(
        f"| {k} | {value:.2f} |" for k, value in best["tokens_per_step_by_drafts"].items()
    )
    accepted = ", ".join(f"{x:.3f}" for x in best["acceptance_per_position"])
    return f"""Replayed on {texts["evaluated"]} held-out {kind} answers; these are the weights of
step {best["step"]}.

| drafted tokens K | tokens per step (accepted drafts and one token of the target) |
|---|---|
{rows}

Accepted per position: {accepted}.
"""
