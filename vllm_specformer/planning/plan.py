"""One plan from settings to rows: `specformer plan` without the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from vllm_specformer.candidates import BEAM
from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.data.openings import read_prompts
from vllm_specformer.environment import hardware, versions
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.head_fields import HeadFields
from vllm_specformer.head_files import find_head
from vllm_specformer.pairing import check_pair, check_weights
from vllm_specformer.places import lasting, named_target
from vllm_specformer.planning.acceptance import from_evaluation, from_shares, kept_of_evaluation
from vllm_specformer.planning.chips import Chip, find_chip
from vllm_specformer.planning.choose import PlanRow, combine
from vllm_specformer.planning.from_bench import rows_from_bench
from vllm_specformer.planning.measure import Machine, Settings
from vllm_specformer.planning.paper import rows_on_paper
from vllm_specformer.planning.plan_file import Plan
from vllm_specformer.planning.settings import PlanSettings
from vllm_specformer.planning.trees import Costs, Trees, costs_by_rows, trees_of
from vllm_specformer.shapes import HeadShape, TargetShape
from vllm_specformer.target.files import find_target
from vllm_specformer.target.model import read_target_config


def make_plan(options: PlanSettings, say: Callable[[str], None]) -> Plan:
    """Measure, take what was measured under load, or compute on paper, and choose.

    Raises:
        SpecFormerError: anything the user can put right.
    """
    if options.bench is not None:
        return _under_load(options, options.bench)
    if options.chip is not None:
        return _on_paper(options, find_chip(options.chip))
    if options.head is None:
        raise SpecFormerError(
            "HEAD: needed to measure with", "name it, or plan on paper with --chip"
        )
    head = find_head(options.head)
    config = read_head_config(head)
    name = options.target or named_target(head, config, options.revision)
    place, _ = find_target(name, options.revision)
    check_pair(config, read_target_config(place), name)
    return _measured(options, head, config, place, name, say)


def _under_load(options: PlanSettings, bench: Path) -> Plan:
    if options.chip is not None or options.prompts:
        raise SpecFormerError(
            "--bench: holds the costs already",
            f"leave {'--prompts' if options.prompts else '--chip'} out",
        )
    rows, about = rows_from_bench(bench)
    source = f"measured under load by `specformer bench` ({bench}, {about['rounds']} rounds)"
    kept = {name: about[name] for name in ("target", "head", "versions", "hardware")}
    trees = _trees(options, rows, partial(costs_by_rows, rows))
    return Plan.of(rows, kept | {"costs": source}, options.margin, trees, _kept(options))


def _on_paper(options: PlanSettings, chip: Chip) -> Plan:
    """Needs no weights, and no head either: then one of the default shape is taken."""
    files = find_head(options.head) if options.head is not None else None
    config = read_head_config(files) if files is not None else None
    name = options.target
    if name is None and files is not None and config is not None:
        name = named_target(files, config, options.revision)
    if name is None:
        raise SpecFormerError("--chip: needs HEAD or --target, to know whose step it is about")
    target = TargetShape.from_config(_configuration(name, options.revision))
    head = HeadShape.default_for(target)
    if config is not None:
        fields = {field: getattr(config, field) for field in HeadFields.model_fields}
        head = HeadShape.from_fields(fields)
    accepted = _given_acceptance(options, _counts(options, head.slots))
    if accepted is None:
        raise SpecFormerError(
            "--chip: needs --eval or --accepted, since nothing runs that could show acceptance"
        )
    costs = partial(
        rows_on_paper,
        chip.derated(options.bandwidth, options.arithmetic),
        target,
        head,
        options.batch,
        context=options.context,
        weight_bytes=options.weight_bytes,
    )
    rows = costs(accepted)
    shares = f"{options.bandwidth:.0%} of its bandwidth, {options.arithmetic:.0%} of its arithmetic"
    about = {
        "target": lasting(name),
        "head": lasting(options.head) if options.head else "a head of the default shape",
        "versions": versions(),
        "costs": f"on paper: {chip.name} at {shares}; {options.context} tokens of context; "
        f"{chip.source}",
    }
    trees = _trees(options, rows, partial(costs, beam=BEAM))
    return Plan.of(rows, about, options.margin, trees, _kept(options))


def _configuration(name: str, revision: str | None) -> dict[str, Any]:
    """A target's config.json alone, of a directory or of the hub."""
    try:
        content, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise SpecFormerError(
            f"target {name}: neither a directory with a config.json nor a model whose "
            f"configuration could be fetched ({str(error).strip().splitlines()[0]})",
            "check the name",
        ) from None
    return dict(content)


def _counts(options: PlanSettings, slots: int) -> list[int]:
    counts = sorted({0, *options.num_speculative_tokens})
    if counts[-1] > slots:
        raise SpecFormerError(
            f"--num-speculative-tokens {counts[-1]}: this head drafts 1 to {slots}"
        )
    return counts


def _given_acceptance(options: PlanSettings, counts: Sequence[int]) -> dict[int, float] | None:
    """Tokens per step by count, where the options tell; None where they must be measured."""
    if options.eval is not None:
        return from_evaluation(options.eval, counts, options.temperature)
    return from_shares(options.accepted, counts) if options.accepted else None


def _trees(options: PlanSettings, rows: Sequence[PlanRow], costs: Costs) -> list[Trees]:
    """Trees beside these chains, where --eval has any."""
    return [] if options.eval is None else trees_of(options.eval, options.temperature, rows, costs)


def _kept(options: PlanSettings) -> dict[int, list[float]] | None:
    """What the likeliest drafts keep, where --eval tells."""
    return None if options.eval is None else kept_of_evaluation(options.eval, options.temperature)


def _measured(
    options: PlanSettings,
    head: Path,
    config: SpecFormerConfig,
    place: Path,
    name: str,
    say: Callable[[str], None],
) -> Plan:
    counts = _counts(options, config.num_draft_slots)
    accepted = _given_acceptance(options, counts)
    if not options.prompts:
        raise SpecFormerError(
            "--prompts: needed to measure with", "give a file, or plan on paper with --chip"
        )
    check_weights(head, config)
    settings = Settings(
        options.batch,
        counts,
        options.cycles,
        options.steps,
        least_seconds=options.seconds,
        max_tokens=options.max_tokens,
    )
    # A visit goes on past the end of the answers, so its texts grow with the steps.
    grown = sum(counts) + len(counts)
    longest = max(options.max_tokens, grown * (options.steps + 2) + 1)
    context = int(options.engine_args.get("max_model_len") or config.max_position_embeddings)
    texts = read_prompts(options.prompts, place, longest, context, say)[: options.max_prompts]
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    engine = {"model": str(place), **options.engine_args}
    with tempfile.TemporaryDirectory(prefix="specformer-plan-") as logs:
        machine = Machine(engine, head, ids, settings, Path(logs), say)
        costs, live = machine.measure(live=accepted is None)
    rows = combine(costs.plain, costs.steps, costs.drafts, accepted or live, costs.prompts)
    source = (
        f"a live run of {len(ids)} prompts" if accepted is None else str(options.eval or "given")
    )
    about = {
        "target": lasting(name),
        "head": lasting(options.head or head),
        "versions": versions(),
        "costs": f"measured on this machine; acceptance: {source}",
        "cycles": options.cycles,
        "hardware": hardware(),
        "engine_args": dict(options.engine_args),
    }
    trees = _trees(options, rows, partial(costs_by_rows, rows))
    return Plan.of(rows, about, options.margin, trees, _kept(options))
