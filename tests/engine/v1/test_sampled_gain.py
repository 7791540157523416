"""What drawn drafts, the default, bring sampled requests over greedy ones, in the engine.

With `-s` the figures of docs/sampled-requests.md.
"""

from __future__ import annotations

import json

import pytest
from vllm import SamplingParams

from support.engines import drafting, engine
from support.outputs import counting
from support.paths import ROOT

FIRST, LAST = 47, 159  # lines 48 to 159
LEAST_GAIN = 1.25


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [4, 8])
def test_tokens_per_step_at_temperature_1(num_tokens: int) -> None:
    lines = (ROOT / "benchmarks" / "prompts-load.jsonl").read_text().splitlines()[FIRST:LAST]
    texts = [json.loads(line)["prompt"] for line in lines]
    params = SamplingParams(temperature=1, max_tokens=128)
    steps = {}
    for name, changes in (("greedy", {"draft_sample_method": "greedy"}), ("drawn", {})):
        with engine(drafting(num_tokens, **changes)) as llm, counting(llm) as counted:
            llm.generate(texts, params, use_tqdm=False)
        steps[name] = counted.tokens_per_step
        print(f"K={num_tokens}, {name} drafts: {steps[name]:.3f} tokens per step")
    assert steps["drawn"] > LEAST_GAIN * steps["greedy"]
