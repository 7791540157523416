"""Stage d: one target, one method, batches from the largest to the smallest.

Every speculating arm accepts synthetically (`rejection_sample_method: synthetic`) at the same
length, so that arms differ by what drafting costs and by nothing else. Trees are the bundled pair's
own, which a step takes as it takes any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_stages import serving
from gpu_stages.arms import PAIR
from gpu_stages.checkpoints import write_head, write_target
from gpu_stages.pair import speculative_config, tree_attention
from gpu_stages.shapes import TARGETS, TOY
from support.paths import TARGET

Options = dict[str, Any]


def run(options: Options) -> Options:
    """Measure one arm.

    Args:
        options: `shape`, `head` (None: no speculation), `num_speculative_tokens`,
            `acceptance_length`, `batches`, `context`, `steps`, `folder` for checkpoints, `engine`;
            of the bundled pair `speculative`, fields beside its head, for what is in checkpoints.
    """
    options = with_checkpoints(options)
    with tree_attention(options.get("speculative")):
        engine = serving.start(options)
    # The largest first: smaller batches then find their prompts in the prefix cache.
    batches = sorted(options["batches"], reverse=True)
    rows = [serving.measure(engine, batch, options) for batch in batches]
    cache = engine.config.cache_config
    return {
        "runner": engine.runner,
        "kv_cache_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        **engine.llm.collective_rpc("describe_drafter")[0],
        "rows": rows[::-1],
    }


def with_checkpoints(options: Options) -> Options:
    """The options with `target`, and `speculative` if there is a head, both written to disk."""
    if options["shape"] == PAIR:
        config = speculative_config(options["speculative"])
        return options | {"target": str(TARGET), "speculative": config}
    shape = TARGETS.get(options["shape"], TOY)
    folder = Path(options["folder"]) / shape.name
    target = write_target(folder / "target", shape)
    options = options | {"target": str(target)}
    if options["head"] is None:
        return options
    head = write_head(folder / options["head"], options["head"], shape, target)
    return options | {
        "speculative": head
        | {
            "num_speculative_tokens": options["num_speculative_tokens"],
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": options["acceptance_length"],
        }
    }
