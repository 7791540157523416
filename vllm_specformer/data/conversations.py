"""What one record says: a conversation's questions, or a text to be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMS = ("messages", "conversations", "prompt", "text")  # the first that a record has counts
FIELDS = (*FORMS, "system", "tools", "kind")
# Role, lower-case, under each of the names it has in data sets.
_NAMES = {
    "system": ("developer",),
    "user": ("human", "prompter"),
    "assistant": (
        *("gpt", "chatgpt", "gpt-4", "gpt4", "model", "bot", "chatbot", "ai", "bard", "bing"),
        *("claude", "function_call", "tool_call"),
    ),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in (role, *names)}
# Where a message has its role and its content: OpenAI's names, ShareGPT's names.
_KEYS = (("role", "content"), ("from", "value"))

Message = dict[str, str]
Tool = dict[str, Any]


class BadRecordError(ValueError):
    """Why one record is left out."""


def shows_tools(template: str | None) -> bool:
    """Whether a chat template has a place for descriptions of tools."""
    return template is not None and "tools" in template


@dataclass(frozen=True)
class Prompt:
    """What the target is asked: a conversation without its answers, or a text to be continued.

    Attributes:
        messages: of system, user and tools, in order.
        tools: descriptions of tools, as chat templates take them.
        kind: what its author calls it, such as "code"; evaluations are reported by it.
    """

    id: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Tool, ...] = ()
    kind: str = ""

    @property
    def turns(self) -> list[list[Message]]:
        """Messages up to and including each user message, or tools' results, to be answered."""
        turns: list[list[Message]] = [[]]
        for place, message in enumerate(self.messages):
            turns[-1].append(message)
            after = self.messages[place + 1]["role"] if place + 1 < len(self.messages) else ""
            # Results of several calls made at once are answered together.
            if message["role"] == "user" or (message["role"] == "tool" and after != "tool"):
                turns.append([])
        return turns[:-1]

    @property
    def num_turns(self) -> int:
        return 1 if self.text is not None else len(self.turns)


def parse(number: int, raw: Any) -> Prompt:
    """Build a prompt from a line of JSON or a record.

    Raises:
        ValueError: the record is malformed; the message says how.
    """
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"not valid JSON ({error})") from None
    if not isinstance(raw, Mapping):
        raise BadRecordError(f"expected an object, found {type(raw).__name__}")
    form = next((name for name in FORMS if raw.get(name) is not None), None)
    if form is None:
        fields = ", ".join(map(str, raw)) or "nothing"
        raise BadRecordError(f"has {fields}, none of {', '.join(FORMS)}")
    value, tools = raw[form], _tools(raw.get("tools"))
    kind = raw["kind"].strip() if isinstance(raw.get("kind"), str) else ""
    if form in ("prompt", "text") and not isinstance(value, list):
        if tools:
            raise BadRecordError(f"{form}: a text has no place for tools, which messages have")
        return Prompt(number, text=_checked(value, form), kind=kind)
    messages = _questions(value, form)
    system = raw.get("system")
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": _checked(system, "system")}, *messages)
    return Prompt(number, messages=messages, tools=tools, kind=kind)


def _questions(turns: Any, form: str) -> tuple[Message, ...]:
    """What system, user and tools say in a conversation; answers are dropped unread."""
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise BadRecordError(f"{form}: expected a list, found {type(turns).__name__}")
    kept: list[Message] = []
    for turn in turns:
        role_key, content_key = _keys(turn, form)
        role = _ROLES.get(str(turn[role_key]).strip().lower())
        if role is None:
            raise BadRecordError(
                f"{form}: {role_key} {turn[role_key]!r} is not one of {', '.join(_NAMES)}"
            )
        content = _joined(turn.get(content_key))
        if role == "tool":
            kept.append(_result(turn, content, content_key))
        elif role == "user" or (role == "system" and content):
            kept.append({"role": role, "content": _checked(content, content_key)})
    if not any(message["role"] == "user" for message in kept):
        raise BadRecordError(f"{form}: no user message")
    if next(message["role"] for message in kept if message["role"] != "system") == "tool":
        raise BadRecordError(f"{form}: a tool speaks before the user")
    return tuple(kept)


def _keys(turn: Any, form: str) -> tuple[str, str]:
    if isinstance(turn, Mapping):
        for keys in _KEYS:
            if turn.get(keys[0]) is not None:
                return keys
    wanted = " or ".join(" and ".join(keys) for keys in _KEYS)
    raise BadRecordError(f"{form}: an entry is no object with {wanted}")


def _result(turn: Mapping[str, Any], content: Any, name: str) -> Message:
    """What a tool returned, possibly nothing, with the names that some templates show."""
    kept = {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    text = "" if content is None or content == "" else _checked(content, name)
    return {"role": "tool", "content": text, **kept}


def _tools(value: Any) -> tuple[Tool, ...]:
    """Descriptions of tools: a list, or one written as JSON, as Parquet files often have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRecordError(f"tools: not valid JSON ({error})") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRecordError("tools: expected a list of objects")
    return tuple(value)


def _joined(content: Any) -> Any:
    """The text of a message given as a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
        raise BadRecordError("content: only text parts are supported")
    return "".join(str(part.get("text", "")) for part in content)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{name}: expected text, found {type(value).__name__}")
    if not value.strip():
        raise BadRecordError(f"{name}: empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f"{name}: half of a surrogate pair, not valid Unicode") from None
    return value
