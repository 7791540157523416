"""Small made-up conversations, in memory and as a directory that `distill` might have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from support.paths import TARGET
from vllm_specformer.data.manifest import Manifest, PromptFile, Sampling, Settings
from vllm_specformer.data.shards import Conversation, ShardWriter
from vllm_specformer.target.files import target_record
from vllm_specformer.training.texts import Text, Texts


def make_texts(
    count: int, vocabulary: int, shortest: int = 6, longest: int = 24, seed: int = 0
) -> Texts:
    """Random conversations; every third has two answers, every fourth was sampled."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.integers(shortest, longest + 1))
        start = int(rng.integers(1, max(2, length // 3)))
        spans = ((start, length),)
        if index % 3 == 2 and length - start > 8:
            spans = ((start, start + 4), (start + 6, length))
        tokens = rng.integers(vocabulary, size=length).astype(np.int32)
        made.append(Text(index, tokens, spans, float(index % 4 == 3)))
    return Texts.collect(made, longest)


def write_distilled(directory: Path, texts: Texts, target: Path = TARGET, shards: int = 2) -> None:
    """A complete directory of distilled answers, written by the module that `distill` uses."""
    settings = Settings(
        target=target_record(str(target), target, None),
        sampling=Sampling(
            temperature=0,
            sampled_share=0.25,
            sampled_temperature=1,
            top_p=1,
            max_tokens=64,
            seed=0,
        ),
        chat_template_sha256=None,
        chat_template_args={},
        prompts=[PromptFile(file="prompts.jsonl", sha256="0" * 64, records=len(texts), bad=0)],
        max_prompts=None,
        prompt_count=len(texts),
        shard_size=-(-len(texts) // shards),
        engine="offline",
        dtype="float32",
        context=1024,
    )
    directory.mkdir(parents=True)
    writer = ShardWriter(directory, settings)
    records = []
    for number in range(settings.num_shards):
        first = number * settings.shard_size
        rows = [
            Conversation(
                id=int(texts.ids[i]),
                input_ids=texts.input_ids(i).tolist(),
                answer_starts=[start for start, _ in texts.answers(i)],
                answer_ends=[end for _, end in texts.answers(i)],
                temperature=float(texts.temperatures[i]),
                finish_reason="stop",
            )
            for i in range(first, min(first + settings.shard_size, len(texts)))
        ]
        records.append(writer.write(number, rows))
    Manifest.of(settings, records, {"vllm-specformer": "0"}).write(directory)


def write_toy_target(directory: Path) -> None:
    """A target with random weights and a vocabulary of 40, small enough for many short runs."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        architectures=["Qwen3ForCausalLM"],
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
