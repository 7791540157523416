"""Stage e: one draft step under the profiler: launches, gaps, bytes, share of the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_stages import serving
from gpu_stages.predict import draft
from gpu_stages.shapes import TARGETS, TOY
from gpu_stages.throughput import with_checkpoints
from gpu_stages.trace import draft_figures
from vllm_specformer.serving.engine import Engine
from vllm_specformer.shapes import TargetShape

Options = dict[str, Any]


def run(options: Options) -> Options:
    """Figures of a SpecFormer draft at each batch; options as stage d's, with `traced` steps."""
    options = with_checkpoints(options)
    engine = serving.start(options)
    sizes = TargetShape.from_config(TARGETS.get(options["shape"], TOY).config())
    rows = [_profile(engine, batch, options, sizes) for batch in sorted(options["batches"])[::-1]]
    return {"rows": rows[::-1]}


def _profile(engine: Engine, batch: int, options: Options, sizes: TargetShape) -> Options:
    drafts, context = options["num_speculative_tokens"], options["context"]
    requests = serving.SteadyBatch(engine, batch, options)
    requests.steps(serving.WARM_UP)
    engine.llm.collective_rpc("start_draft_clock")
    requests.steps(2)  # with the clock in place
    engine.llm.collective_rpc("start_trace")
    requests.steps(options["traced"])
    path = Path(options["folder"]) / f"trace-{batch}.json"
    engine.llm.collective_rpc("write_trace", args=(str(path),))
    requests.end()
    step, _ = draft(options["head"], sizes, batch, drafts, context)
    found = draft_figures(json.loads(path.read_text()))
    rate = step.total.bytes / (1e-6 * found["busy"]) if found["busy"] else 0.0
    return {"batch": batch, "least_bytes": step.total.bytes, "bytes_per_second": rate, **found}
