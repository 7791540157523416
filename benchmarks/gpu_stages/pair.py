"""Stage c: the bundled pair's answers from one engine, to be compared with the other engines'.

Every engine answers the same jobs: greedily, all prompts at once; the same in groups of `group`,
which is the control for what batching alone changes; and sampled with a seed for each prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Options = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "examples" / "models" / "python-target"
HEAD = ROOT / "examples" / "models" / "python-specformer"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"


def run(options: Options) -> Options:
    """Answers of one engine as token ids, and what became of its drafts.

    Args:
        options: `speculative` (None: no speculation), `prompts`, `max_tokens`, `group`, `engine`.
    """
    llm = start(options)
    texts, limit, group = prompts(options["prompts"]), options["max_tokens"], options["group"]
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
    return {"answers": answers, "counters": counters}


def start(options: Options, worker_extension: str = "") -> Any:
    """An engine of the bundled target; `options["engine"]` has the last word."""
    from vllm import LLM

    engine = {
        "max_model_len": 512,
        "max_num_seqs": 64,
        "disable_log_stats": False,
        "enable_prefix_caching": False,  # a group is to compute its prompts like any batch
        "seed": 0,
        "worker_extension_cls": worker_extension,
        **options["engine"],
    }
    return LLM(model=str(TARGET), speculative_config=options.get("speculative"), **engine)


def speculative(num_tokens: int = 4, **changes: Any) -> Options:
    """The bundled head's speculative config."""
    config = {"method": "specformer", "model": str(HEAD), "num_speculative_tokens": num_tokens}
    return config | changes


def prompts(number: int) -> list[str]:
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[:number]
    return [json.loads(line)["prompt"] for line in lines]


def greedy(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens)


def _seeded(max_tokens: int, number: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=1, seed=1000 + number, max_tokens=max_tokens)


def _answers(llm: Any, texts: list[str], params: Any) -> list[str]:
    """Token ids in one string for each prompt: one line of the result file."""
    outputs = llm.generate(texts, params, use_tqdm=False)
    return [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs]
