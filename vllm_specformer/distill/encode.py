"""Token ids of prompts and of what stands between two turns, by the target's tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_specformer.data.prompts import Message, Tool, shows_tools
from vllm_specformer.target.files import TargetError, end_token_ids

# Stands for an answer while the text after it is looked up. No template trims or escapes it.
_ANSWER = "SPECFORMER7f3a9c52ANSWER"


class TemplateRefusedError(ValueError):
    """The chat template raised an error for a conversation."""


class Encoder:
    """A tokenizer with the chat template in use.

    Args:
        tokenizer: of Transformers.
        template: Jinja source; None refuses conversations.
        arguments: variables for the template, such as `enable_thinking`.
        end_ids: tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        arguments: dict[str, Any] | None = None,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.arguments = arguments or {}
        eos = tokenizer.eos_token_id
        self.end_ids = end_ids | ({eos} if eos is not None else set())

    @property
    def template_sha256(self) -> str | None:
        return None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    def text(self, text: str) -> list[int]:
        """A text to be continued, with the tokens that the tokenizer puts before any text."""
        return list(self.tokenizer(text)["input_ids"])

    @property
    def shows_tools(self) -> bool:
        """Whether the template has a place for descriptions of tools."""
        return shows_tools(self.template)

    def opening(self, turn: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The first turn up to where the target's answer begins.

        Args:
            tools: the conversation's, which the template describes to the target.

        Raises:
            TemplateRefusedError: see the message.
        """
        return self._plain(self._render(list(turn), tools))

    def following(
        self, turns: Sequence[Sequence[Message]], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """What stands between the answer to the last turn but one and the last turn's answer.

        It comes from the template with a stand-in for the answers, so these are never encoded
        anew: the ids of a conversation only grow.

        Raises:
            TemplateRefusedError: see the message.
        """
        messages: list[Message] = []
        for turn in turns[:-1]:
            messages += [*turn, {"role": "assistant", "content": _ANSWER}]
        rendered = self._render([*messages, *turns[-1]], tools)
        asked = [message for message in turns[-1] if message["role"] != "tool"]
        if len(asked) < len(turns[-1]) and rendered == self._render([*messages, *asked], tools):
            raise TemplateRefusedError("it does not show what tools return")
        _, found, after = rendered.rpartition(_ANSWER)
        if not found:
            raise TemplateRefusedError("it does not show earlier answers")
        return self._plain(after)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: list[Message], tools: Sequence[Tool]) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **self.arguments | ({"tools": list(tools)} if tools else {}),
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusedError(str(error)) from None


def load_encoder(
    directory: Path,
    template_file: Path | None = None,
    arguments: dict[str, Any] | None = None,
    chats: bool = True,
) -> Encoder:
    """The tokenizer of the target in `directory`.

    Args:
        template_file: chat template to use in place of the target's own.
        chats: whether there are conversations, which need a template.

    Raises:
        TargetError: no usable tokenizer, or conversations and no template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # every family fails in a way of its own
        raise TargetError(
            f"target {directory}: its tokenizer cannot be loaded ({_first_line(error)})"
        ) from None
    template = _template(tokenizer, directory, template_file) if chats else None
    return Encoder(tokenizer, template, arguments, end_token_ids(directory))


def _template(tokenizer: Any, directory: Path, file: Path | None) -> str:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(f"--chat-template {file}: not readable ({error})") from None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise TargetError(
            f"target {directory}: it has no chat template, and there are conversations among the "
            "prompts",
            "give plain texts (field `text`), or a template with --chat-template FILE",
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
