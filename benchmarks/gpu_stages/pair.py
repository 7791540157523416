"""Stage c: the bundled pair's answers from one engine, to be compared with the other engines'.

Every engine answers the same jobs: greedily, all prompts at once; the same in groups of `group`,
which is the control for what batching alone changes; and sampled with a seed for each prompt. Then
drafts are held against the dense head on a CPU, given the states that the target handed out.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from gpu_stages.draft_clock import QUALIFIED_NAME
from support.paths import HEAD, TARGET

Options = dict[str, Any]
DRAFTER, TREE_DRAFTER = "SpecFormerSpeculator", "CandidateSpeculator"


def run(options: Options) -> Options:
    """Answers of one engine as token ids, what drafts in it, and what became of its drafts.

    Args:
        options: `speculative`, fields of the speculative config beside the head and K=4, or None;
            `prompts`, `max_tokens`, `group`, `engine`;
            `dense`: how many of the prompts have their drafts compared, in this process.

    Raises:
        RuntimeError: vLLM runs, but drafts with another class than ours.
    """
    from support.engines import greedy, prompts

    started = time.perf_counter()
    llm = start(options)
    seconds = time.perf_counter() - started
    found = llm.collective_rpc("describe_drafter")[0]
    asked = options["speculative"]
    drafter = TREE_DRAFTER if _has_tree(asked) else None if asked is None else DRAFTER
    if found["drafter"] != drafter:
        raise RuntimeError(
            f"vLLM drafts with {found['drafter']} instead of {drafter}: the plugin is not in "
            "place; `specformer doctor` says why"
        )
    texts, limit, group = prompts()[: options["prompts"]], options["max_tokens"], options["group"]
    answers = {
        "greedy": _answers(llm, texts, greedy(limit)),
        "greedy in groups": [
            answer
            for first in range(0, len(texts), group)
            for answer in _answers(llm, texts[first : first + group], greedy(limit))
        ],
        "seeded": _answers(llm, texts, [_seeded(limit, n) for n in range(len(texts))]),
    }
    counters = {
        metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }
    dense: Options = {}
    if options["dense"]:
        from support.v2.drafts import against_dense

        dense = vars(against_dense(llm, texts[: options["dense"]], greedy(16)))
    found |= {"start_seconds": seconds, "dense": dense}
    return found | {"answers": answers, "counters": counters}


def start(options: Options) -> Any:
    """An engine of the bundled target; `options["engine"]` has the last word."""
    from vllm import LLM

    engine = {
        "max_model_len": 512,
        "max_num_seqs": 64,
        "disable_log_stats": False,
        "enable_prefix_caching": False,  # a group is to compute its prompts like any batch
        "seed": 0,
        "worker_extension_cls": QUALIFIED_NAME,
        **options["engine"],
    }
    config = speculative_config(options["speculative"])
    with tree_attention(config):
        return LLM(model=str(TARGET), speculative_config=config, **engine)


def speculative_config(fields: Options | None) -> Options | None:
    """The pair's, with K=4 where the fields do not say otherwise."""
    if fields is None:
        return None
    return {"method": "specformer", "model": str(HEAD), "num_speculative_tokens": 4} | fields


def tree_attention(config: Options | None) -> contextlib.AbstractContextManager[None]:
    """On a CPU, which has no FlashAttention, the tests' own attention where trees need one."""
    if torch.cuda.is_available() or not _has_tree(config):
        return contextlib.nullcontext()
    from support.v2.tree_attention import tree_attention as on_a_cpu

    return on_a_cpu()


def _has_tree(config: Options | None) -> bool:
    return "tree_nodes" in (config or {})


def _seeded(max_tokens: int, number: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=1, seed=1000 + number, max_tokens=max_tokens)


def _answers(llm: Any, texts: list[str], params: Any) -> list[str]:
    """Token ids in one string for each prompt: one line of the result file."""
    outputs = llm.generate(texts, params, use_tqdm=False)
    return [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs]
