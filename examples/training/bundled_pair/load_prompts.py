"""Choose prompts for a load test: those whose greedy answer has a length and an end of its own.

A load of answers of ten tokens measures how prompts are read, and one of a target that repeats
itself up to the limit measures its loops. The choice knows the target only, no head and no method
of drafting.

    python load_prompts.py TARGET PROMPTS.jsonl --out ../../../benchmarks/prompts-load.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vllm_specformer.data.openings import read_prompts

_CONTEXT = 512
_MEMORY = 0.3


def answers(target: Path, prompts: list[str], max_tokens: int) -> list[Any]:
    """vLLM's greedy completions, without speculation."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype="float32",
        enforce_eager=True,
        max_model_len=_CONTEXT,
        gpu_memory_utilization=_MEMORY,
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    return [output.outputs[0] for output in outputs]


def chosen(prompts: list[str], outputs: list[Any], shortest: int, longest: int) -> list[str]:
    """Prompts whose answer ended by itself within the lengths, each answer once."""
    by_answer: dict[tuple[int, ...], str] = {}
    for prompt, output in zip(prompts, outputs, strict=True):
        if output.finish_reason == "stop" and shortest <= len(output.token_ids) <= longest:
            by_answer.setdefault(tuple(output.token_ids), prompt)
    return list(by_answer.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("prompts", type=Path, nargs="+", help="as `specformer bench` takes them")
    parser.add_argument("--shortest", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--count", type=int, default=160, help="prompts to choose")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts, args.target, args.longest + 1, _CONTEXT, print)
    found = chosen(
        prompts, answers(args.target, prompts, args.longest + 1), args.shortest, args.longest
    )
    if len(found) < args.count:
        parser.error(f"only {len(found)} of {len(prompts)} answers are of such a length")
    lines = [json.dumps({"prompt": text}) + "\n" for text in found[: args.count]]
    args.out.write_text("".join(lines))
    print(
        f"{len(found)} of {len(prompts)} answers end by themselves after {args.shortest} to "
        f"{args.longest} tokens; wrote {len(lines)} prompts to {args.out}"
    )


if __name__ == "__main__":
    main()
