"""Prompts to send once each: what a conversation opens with, and texts to be continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_specformer.data.prompts import Prompt, scan, shortened, shows_tools, without_tools
from vllm_specformer.errors import SpecFormerError

# vLLM's benchmark client leaves out what is outside of these, for all data sets of its form.
_SHORTEST, _LONGEST, _LONGEST_TEXT = 4, 1024, 2048


def read_prompts(
    paths: Sequence[Path],
    target: Path,
    max_tokens: int,
    context: int,
    say: Callable[[str], None],
) -> list[str]:
    """The first question of every conversation, rendered, and every text; each once.

    Args:
        context: the longest text the server takes, in tokens.
        say: told what is left out.

    Raises:
        PromptError: files that cannot be used.
        SpecFormerError: conversations for a target without a chat template, or nothing fits.
    """
    found = scan(paths)
    if found.bad:
        say(f"{len(found.bad)} malformed records left out:\n{shortened(found.bad)}")
    tokenizer = AutoTokenizer.from_pretrained(target)
    if found.chats and not tokenizer.chat_template:
        raise SpecFormerError(
            f"--prompts: {found.chats} records are conversations, and the target {target} has no "
            "chat template",
            "give texts to be continued",
        )
    if found.with_tools and not shows_tools(tokenizer.get_chat_template()):
        say(without_tools(found.with_tools))
    longest = min(_LONGEST, min(_LONGEST_TEXT, context) - max_tokens)
    refused: list[str] = []
    read = (_text(prompt, tokenizer, refused) for prompt in found.read(found.ids))
    texts = dict.fromkeys(text for text in read if text is not None)
    if refused:
        say(f"{len(refused)} prompts left out: refused by the chat template ({refused[0]})")
    fitting = [text for text in texts if _SHORTEST <= len(tokenizer(text)["input_ids"]) <= longest]
    if not fitting:
        raise SpecFormerError(
            f"--prompts: none of {len(texts)} texts has {_SHORTEST} to {longest} tokens",
            f"with --max-tokens {max_tokens} only such texts fit, so give other texts or lower it",
        )
    return fitting


def _text(prompt: Prompt, tokenizer: Any, refused: list[str]) -> str | None:
    """The prompt as text; None, and why, where the template refuses it."""
    if prompt.text is not None:
        return prompt.text
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            prompt.turns[0],
            tools=list(prompt.tools) or None,
            add_generation_prompt=True,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        refused.append(str(error))
        return None
    return str(text)
