"""What the target is asked: token ids of prompts, from files or from distilled conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specformer.data.manifest import Sampling, read_manifest
from vllm_specformer.data.prompts import Prompt, derive, scan, shortened, without_tools
from vllm_specformer.data.shards import read_shards
from vllm_specformer.distill.dialogue import SEED_BITS, Dialogue, Request
from vllm_specformer.distill.encode import Encoder
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.training.result import data_digest
from vllm_specformer.training.texts import Texts, held_out_texts, read_texts


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids, by their number; `context` is the most tokens a text may have.

    `kinds`: what the prompts' authors call them, where they do.
    """

    prompts: dict[int, list[int]]
    context: int
    max_tokens: int
    seed: int
    kinds: dict[int, str] = field(default_factory=dict)

    def requests(self, temperature: float) -> dict[int, Request]:
        """How each prompt is to be continued; equal arguments give equal requests."""
        return {
            number: Request(
                prompt_ids=ids,
                temperature=temperature,
                top_p=1.0,
                max_tokens=min(self.max_tokens, self.context - len(ids)),
                seed=derive(self.seed, "answer", number, 0) % 2**SEED_BITS if temperature else None,
            )
            for number, ids in self.prompts.items()
        }


def from_files(
    files: list[Path],
    encoder: Callable[[bool], Encoder],
    *,
    context: int,
    max_tokens: int,
    max_prompts: int | None,
    max_bad_lines: int | None,
    seed: int,
    say: Callable[[str], None],
) -> Questions:
    """The first question of every conversation, and every text to be continued.

    Args:
        encoder: told whether there are conversations.

    Raises:
        SpecFormerError: files that cannot be used, or no prompt that fits the context.
    """
    found = scan(files, max_bad_lines)
    if found.bad:
        say(f"{len(found.bad)} malformed records left out:\n{shortened(found.bad)}")
    encode = encoder(bool(found.chats))
    if found.with_tools and not encode.shows_tools:
        say(without_tools(found.with_tools))
    sampling = Sampling(
        temperature=0,
        sampled_share=0,
        sampled_temperature=0,
        top_p=1,
        max_tokens=max_tokens,
        seed=seed,
    )
    prompts, kinds, skipped = {}, {}, Counter[str]()
    for prompt in found.read(found.select(max_prompts, seed)):
        dialogue = Dialogue(_first_turn(prompt), encode, sampling, context)
        if dialogue.skipped:
            skipped[dialogue.skipped] += 1
        else:
            prompts[prompt.id] = dialogue.request().prompt_ids
            if prompt.kind:
                kinds[prompt.id] = prompt.kind
    for reason, count in skipped.items():
        say(f"{count} prompts left out: {reason}")
    if not prompts:
        raise SpecFormerError(
            f"--prompts: none of {sum(skipped.values())} prompts can be used "
            f"({', '.join(skipped)})",
            f"the context is {context:,} tokens",
        )
    return Questions(prompts, context, max_tokens, seed, kinds)


def _first_turn(prompt: Prompt) -> Prompt:
    if prompt.text is not None:
        return prompt
    return replace(prompt, messages=tuple(prompt.turns[0]))


def unseen(
    data: Path,
    fingerprint: str,
    provenance: dict[str, Any] | None,
    *,
    context: int,
    max_prompts: int | None,
    say: Callable[[str], None],
) -> Texts:
    """Distilled conversations that the head's training did not see, at most `max_prompts`.

    Of the data it was trained on that is the part it held out, of other data it is all.

    Args:
        provenance: of the head; None where it has none.

    Raises:
        SpecFormerError: no distilled answers of this target, none unseen, or all are too long.
    """
    manifest = read_manifest(data, fingerprint)
    texts = Texts.collect(read_texts(read_shards(data, manifest)), context)
    chosen = np.arange(len(texts))
    if provenance is None:
        say(
            "note: the head has no provenance.json, which would tell what it was trained on; if it "
            "was trained on --data, the figures flatter it"
        )
    elif data_digest(manifest) in _digests(provenance["data"]):
        settings = provenance["settings"]
        chosen = held_out_texts(texts, settings["eval_share"])
        say(f"the head was trained on this data; {len(chosen)} texts of it were held out")
    if not len(chosen):
        raise SpecFormerError(
            f"--data {data}: the head was trained on all of it (--eval-share 0)",
            "evaluate on --prompts that it has not seen",
        )
    kept = set(chosen[:max_prompts].tolist())
    return Texts.collect((text for i, text in enumerate(texts.each()) if i in kept), context)


def _digests(data: dict[str, Any]) -> list[str]:
    """Of the directories that a head was trained on; one digest alone in heads of version 0.1.0."""
    return data.get("manifests") or [data["manifest_sha256"]]


def asked_again(texts: Texts, *, context: int, max_tokens: int, seed: int) -> Questions:
    """The prompts of distilled conversations, up to their first answer, to be answered anew."""
    prompts = {
        int(texts.ids[i]): texts.input_ids(i)[: texts.answers(i)[0][0]].tolist()
        for i in range(len(texts))
    }
    return Questions(prompts, context, max_tokens, seed)
