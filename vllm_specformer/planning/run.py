"""One plan from options to rows: `specformer plan` without the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_specformer.bench.hardware import hardware
from vllm_specformer.bench.prompts import read_prompts
from vllm_specformer.config import HeadFields, SpecFormerConfig, read_config
from vllm_specformer.data.target import find_target, read_json
from vllm_specformer.engine.checks import check_pair
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.planning.acceptance import from_evaluation
from vllm_specformer.planning.chips import find_chip
from vllm_specformer.planning.choose import MARGIN, combine
from vllm_specformer.planning.measure import Machine, Settings
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.plan import Plan
from vllm_specformer.planning.shapes import HeadShape, TargetShape
from vllm_specformer.training.result import versions
from vllm_specformer.training.target import read_config as read_target_config
from vllm_specformer.weights import check_weights

BATCHES = (1, 2, 4, 8, 16, 32, 64)
COUNTS = (2, 4, 8)
_OWN = ("model", "speculative_config", "disable_log_stats")


@dataclass(frozen=True)
class Options:
    """The command's arguments; see `cli/plan.py` for their meaning."""

    head: Path
    target: str | None = None
    revision: str | None = None
    prompts: Sequence[Path] = ()
    eval: Path | None = None
    temperature: float = 0.0
    batch: Sequence[int] = BATCHES
    num_speculative_tokens: Sequence[int] = COUNTS
    cycles: int = 3
    steps: int = 8
    max_tokens: int = 128
    max_prompts: int = 64
    margin: float = MARGIN
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    chip: str | None = None
    bandwidth: float = 1.0
    arithmetic: float = 1.0
    context: int = 1024
    weight_bytes: float = 2.0


def make_plan(options: Options, say: Callable[[str], None]) -> Plan:
    """Measure, or compute on paper, and choose.

    Raises:
        SpecFormerError: anything the user can put right.
    """
    config = read_config(options.head)
    counts = sorted({0, *options.num_speculative_tokens})
    if counts[-1] > config.num_draft_slots:
        raise SpecFormerError(
            f"--num-speculative-tokens {counts[-1]}: this head drafts 1 to {config.num_draft_slots}"
        )
    name = options.target or config.target_name_or_path
    place, _ = find_target(name, options.revision)
    check_pair(config, read_target_config(place), name)
    accepted = from_evaluation(options.eval, counts, options.temperature) if options.eval else None
    about = {"target": name, "head": str(options.head), "versions": versions()}
    if options.chip is None:
        return _measured(options, config, place, counts, accepted, about, say)
    if accepted is None:
        raise SpecFormerError("--chip: needs --eval, since nothing runs that could show acceptance")
    return _on_paper(options, config, place, accepted, about)


def _on_paper(
    options: Options,
    config: SpecFormerConfig,
    place: Path,
    accepted: dict[int, float],
    about: dict[str, Any],
) -> Plan:
    chip = find_chip(options.chip or "").derated(options.bandwidth, options.arithmetic)
    fields = {name: getattr(config, name) for name in HeadFields.model_fields}
    rows = rows_on_paper(
        chip,
        TargetShape.from_config(read_json(place / "config.json")),
        HeadShape.from_fields(fields),
        options.batch,
        accepted,
        options.context,
        weight_bytes=options.weight_bytes,
    )
    costs = f"on paper: {chip.name}; {options.context} tokens of context; {chip.source}"
    return Plan.of(rows, about | {"costs": costs}, options.margin)


def _measured(
    options: Options,
    config: SpecFormerConfig,
    place: Path,
    counts: list[int],
    accepted: dict[int, float] | None,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> Plan:
    for name in options.engine_args:
        if name in _OWN:
            raise SpecFormerError(f"--engine-args: {name!r} is set by the plan; leave it out")
    if not options.prompts:
        raise SpecFormerError("--prompts: needed to measure with; or plan on paper with --chip")
    check_weights(options.head, config)
    settings = Settings(
        options.batch, counts, options.cycles, options.steps, max_tokens=options.max_tokens
    )
    # A visit goes on past the end of the answers, so its texts grow with the steps.
    grown = sum(counts) + len(counts)
    longest = max(options.max_tokens, grown * (options.steps + 2) + 1)
    context = int(options.engine_args.get("max_model_len", config.max_position_embeddings))
    texts = read_prompts(options.prompts, place, longest, context)[: options.max_prompts]
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    engine = {"model": str(place), **options.engine_args}
    with tempfile.TemporaryDirectory(prefix="specformer-plan-") as logs:
        machine = Machine(engine, options.head, ids, settings, Path(logs), say)
        costs, live = machine.measure(live=accepted is None)
    rows = combine(costs.plain, costs.steps, costs.drafts, accepted or live)
    source = f"{options.eval}" if accepted else f"a live run of {len(ids)} prompts"
    about |= {
        "costs": f"measured on this machine; acceptance: {source}",
        "hardware": hardware(),
        "engine_args": dict(options.engine_args),
    }
    return Plan.of(rows, about, options.margin)
