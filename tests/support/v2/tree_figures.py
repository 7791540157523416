"""Tokens per step of trees in the V2 runner: rows "engine" of benchmarks/results/trees.json.

    cd tests && python -m support.v2.tree_figures

Sampled requests have seeds. With --compare the texts are held against those of an engine without
speculation, which takes twice as long. Rows of the same rule, temperature and nodes are replaced,
all others stay. An hour on one core: Triton's interpreter runs every kernel.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from support.environment import prepare_interpreted_engines

prepare_interpreted_engines()

from vllm import LLM, SamplingParams  # noqa: E402

from support.engines import drafting  # noqa: E402
from support.outputs import Tokens, counting, token_ids  # noqa: E402
from support.paths import ROOT  # noqa: E402
from support.v2.engines import engine  # noqa: E402
from support.v2.tree_attention import PlainAttention, tree_attention  # noqa: E402
from vllm_specformer.data.files import write_atomic  # noqa: E402

PROMPTS = ROOT / "benchmarks" / "prompts-load.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "trees.json"
FITTED = 48  # the first prompts, which the ranking of trees is fitted on
SLOTS = 8
CASES = ((0.0, 16), (1.0, 16), (0.6, 16), (0.0, 8), (1.0, 8))
WIDE = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 256 << 20}


def sampling(count: int, tokens: int, temperature: float) -> list[SamplingParams]:
    seeds = (1000 + n if temperature else None for n in range(count))
    return [SamplingParams(temperature=temperature, max_tokens=tokens, seed=seed) for seed in seeds]


def answer(llm: LLM, texts: Sequence[str], params: list[SamplingParams]) -> list[list[Tokens]]:
    return token_ids(llm.generate(list(texts), params, use_tqdm=True))


def measure(
    texts: Sequence[str], tokens: int, temperature: float, nodes: int, compare: bool
) -> dict[str, Any]:
    """A row of the file.

    Raises:
        SystemExit: a text differs from the one without speculation.
    """
    params = sampling(len(texts), tokens, temperature)
    alone: list[list[Tokens]] | None = None
    if compare:
        with tree_attention(PlainAttention), engine(None, **WIDE) as llm:
            alone = answer(llm, texts, params)
    # In parts, whose spread gives the standard error.
    parts = [slice(first, first + 16) for first in range(0, len(texts), 16)]
    found: list[list[Tokens]] = []
    steps, emitted = [], []
    speculative = drafting(SLOTS, tree_nodes=nodes)
    with tree_attention(), engine(speculative, **WIDE) as llm:
        for part in parts:
            with counting(llm) as counted:
                found += answer(llm, texts[part], params[part])
            steps.append(counted["spec_decode_num_drafts"])
            emitted.append(steps[-1] + counted["spec_decode_num_accepted_tokens"])
    wrong = [n for n, text in enumerate(found) if alone is not None and text != alone[n]]
    if wrong:
        raise SystemExit(f"temperature {temperature}, {nodes} nodes: texts {wrong} differ")
    mean = sum(emitted) / sum(steps)
    spread = [e - mean * s for e, s in zip(emitted, steps, strict=True)]
    error = math.sqrt(len(parts) / (len(parts) - 1) * sum(d * d for d in spread)) / sum(steps)
    return {
        "rule": "coupled" if temperature else "greedy",
        "temperature": temperature,
        "nodes": nodes,
        "tokens_per_step": round(mean, 3),
        "stderr": round(error, 4),
        "where": "engine",
        "max_tokens": tokens,
    }


def keep(row: dict[str, Any]) -> None:
    names = ("rule", "temperature", "nodes", "where", "max_tokens")
    old = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    others = [r for r in old if any(r[name] != row[name] for name in names)]
    write_atomic(RESULT, (json.dumps({"rows": [*others, row]}, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=72, help="most tokens of a text")
    parser.add_argument("--prompts", type=int, default=112, help="prompts to take")
    parser.add_argument("--compare", action="store_true", help="also run without speculation")
    args = parser.parse_args()
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[FITTED : FITTED + args.prompts]
    texts = [json.loads(line)["prompt"] for line in lines]
    for temperature, nodes in CASES:
        row = measure(texts, args.tokens, temperature, nodes, args.compare)
        print(json.dumps(row), flush=True)
        keep(row)


if __name__ == "__main__":
    main()
