"""Offline generation with the bundled pair: `python examples/offline/generate.py`."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
PROMPTS = [
    'def get_pairs(word):\n    """Return the set of symbol pairs in a word."""',
    'def close(self):\n    """Close the file."""',
    'def _prime_factors(n: int) -> list[int]:\n    """Return the prime factors of n in order."""',
]


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the models lie in this repository
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODELS / "python-target"),
        speculative_config={
            "method": "specformer",
            "model": str(MODELS / "python-specformer"),
            "num_speculative_tokens": 4,
        },
        max_model_len=512,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
        disable_log_stats=False,  # needed for get_metrics
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=128)):
        print(f"\n{output.prompt}{output.outputs[0].text}")
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    accepted = counts["vllm:spec_decode_num_accepted_tokens"]
    print(f"\ntokens per step: {1 + accepted / counts['vllm:spec_decode_num_drafts']:.2f}")


# vLLM spawns its engine's process, which imports this file again.
if __name__ == "__main__":
    main()
