"""Hidden states that vLLM extracts, against those of Transformers, on either runner."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.paths import TARGET
from vllm_specformer.serving.engine import Engine
from vllm_specformer.serving.hidden_states import engine_arguments, extract
from vllm_specformer.target.hidden_states import HookedTarget

IDS = (0, 1, 2, 3, 4, 5, 6)
# One ends with a block, one with a prompt's step, one needs three steps.
LENGTHS = (5, 32, 64, 150, 17)
_SAME = 1e-5  # of a state's norm: another order of summation


def assert_as_in_transformers(directory: Path, runner: str) -> None:
    """Extract the states of random texts; prompts are computed 64 tokens at a time."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2048, (n,), generator=generator).tolist() for n in LENGTHS]
    arguments = engine_arguments(TARGET, IDS, "float32", max(LENGTHS) + 1, directory)
    small = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 128 << 20,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
    }
    engine = Engine(arguments | small)
    try:
        assert engine.runner == runner
        found = extract(engine, texts)["texts"]
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    target = HookedTarget(model, IDS)
    assert len(found) == len(texts)
    for text, (file, token, logprob) in zip(texts, found, strict=True):
        content = load_file(file)
        assert content["token_ids"].tolist() == text
        states, last = target(torch.tensor([text]))
        expected = torch.stack(states, 2)[0]
        apart = (content["hidden_states"] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert apart.max() < _SAME
        logprobs = target.lm_head(last[0, -1]).log_softmax(-1)
        assert token == int(logprobs.argmax())
        assert abs(logprob - float(logprobs[token])) < 1e-3
    assert not list(directory.glob("*.partial"))
