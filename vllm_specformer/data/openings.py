"""Prompts to send once each: what a conversation opens with, and texts to be continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_specformer.data.prompts import Prompt, scan
from vllm_specformer.errors import SpecFormerError

# vLLM's benchmark client leaves out what is outside of these, for all data sets of its form.
_SHORTEST, _LONGEST, _LONGEST_TEXT = 4, 1024, 2048


def read_prompts(paths: Sequence[Path], target: Path, max_tokens: int, context: int) -> list[str]:
    """The first question of every conversation, rendered, and every text; each once.

    Args:
        context: the longest text the server takes, in tokens.

    Raises:
        PromptError: files that cannot be used.
        SpecFormerError: conversations for a target without a chat template, or nothing fits.
    """
    found = scan(paths)
    tokenizer = AutoTokenizer.from_pretrained(target)
    if found.chats and not tokenizer.chat_template:
        raise SpecFormerError(
            f"--prompts: {found.chats} records are conversations, and the target {target} has no "
            "chat template; give texts to be continued"
        )
    longest = min(_LONGEST, min(_LONGEST_TEXT, context) - max_tokens)
    texts = dict.fromkeys(_text(prompt, tokenizer) for prompt in found.read(found.ids))
    fitting = [text for text in texts if _SHORTEST <= len(tokenizer(text)["input_ids"]) <= longest]
    if not fitting:
        raise SpecFormerError(
            f"--prompts: none of {len(texts)} texts has {_SHORTEST} to {longest} tokens; with "
            f"--max-tokens {max_tokens} no other fits"
        )
    return fitting


def _text(prompt: Prompt, tokenizer: Any) -> str:
    if prompt.text is not None:
        return prompt.text
    return str(
        tokenizer.apply_chat_template(prompt.turns[0], add_generation_prompt=True, tokenize=False)
    )
