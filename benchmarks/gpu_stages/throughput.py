"""Stage d: one target, one method, batches from the largest to the smallest.

Every speculating arm accepts synthetically (`rejection_sample_method: synthetic`) at the same
length, so that arms differ by what drafting costs and by nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_stages import serving
from gpu_stages.checkpoints import write_head, write_target
from gpu_stages.shapes import TARGETS, TOY

Options = dict[str, Any]


def run(options: Options) -> Options:
    """Measure one arm.

    Args:
        options: `shape`, `head` (None: no speculation), `num_speculative_tokens`,
            `acceptance_length`, `batches`, `context`, `steps`, `folder` for checkpoints, `engine`.
    """
    shape = TARGETS.get(options["shape"], TOY)
    folder = Path(options["folder"]) / shape.name
    target = write_target(folder / "target", shape)
    options = options | {"target": str(target)}
    if options["head"] is not None:
        head = write_head(folder / options["head"], options["head"], shape, target)
        options["speculative"] = head | {
            "num_speculative_tokens": options["num_speculative_tokens"],
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": options["acceptance_length"],
        }
    llm = serving.start(options)
    # The largest first: smaller batches then find their prompts in the prefix cache.
    batches = sorted(options["batches"], reverse=True)
    rows = [serving.measure(llm, batch, options) for batch in batches]
    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks or 0
    return {
        "runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "kv_cache_tokens": blocks * config.cache_config.block_size,
        **llm.collective_rpc("describe_drafter")[0],
        "rows": rows[::-1],
    }
