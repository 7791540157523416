"""The table: every feature of vLLM that is tried together with speculation, as data.

`docs/compatibility.md` is this table with the recorded outcomes (see `document.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SAME = "same"  # the output without speculation, token for token, in fp32
REFUSED = "refused"  # one message, before weights are loaded or before the request is admitted
REPEATS = (
    "repeats"  # sampled: a seeded request repeats itself; its distribution is tested elsewhere
)

V1, V2 = "v1", "v2"


@dataclass(frozen=True)
class Request:
    """A feature that a request asks for.

    Attributes:
        name: of the field in vLLM's `SamplingParams`, or what is asked of it.
        settings: keyword arguments of `SamplingParams`; greedy unless they say otherwise.
        expected: what happens, on both runners.
        message: of a refusal, as a regular expression.
        changes_output: it gives another text than plain greedy on the prompts used here.
    """

    name: str
    settings: Mapping[str, Any]
    expected: str = SAME
    message: str = ""
    changes_output: bool = False
    note: str = ""

    def __str__(self) -> str:
        return self.name


def structured(**constraint: Any) -> dict[str, Any]:
    """Keyword arguments of `StructuredOutputsParams`, which features.py must not import."""
    return {"structured": constraint, "max_tokens": 40}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["get", "set"]}, "count": {"enum": [1, 22, 333]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "return " word (" + " word)*\nword ::= [a-z]{2,6}'
# At temperature 1, this leaves the most likely token only: sampled requests can be compared.
ONE_LEFT = {"temperature": 1.0, "top_k": 1}

REQUESTS: tuple[Request, ...] = (
    Request("greedy", {}),
    Request("top_k", ONE_LEFT, note="with `top_k=1` at temperature 1"),
    Request("top_p", {"temperature": 1.0, "top_p": 1e-6}, note="with `top_p=1e-6`"),
    Request("n", {"n": 3, **ONE_LEFT}, note="three completions each"),
    Request("max_tokens=1", {"max_tokens": 1}, changes_output=True),
    Request("min_tokens", {"min_tokens": 30, "max_tokens": 32}, changes_output=True),
    Request("ignore_eos", {"ignore_eos": True, "max_tokens": 32}, changes_output=True),
    Request("stop", {"stop": ["return", " =", "("]}, changes_output=True),
    Request(
        "include_stop_str_in_output",
        {"stop": ["self", "if", "("], "include_stop_str_in_output": True},
        changes_output=True,
    ),
    Request("stop_token_ids", {"stop_token_ids": list(range(200, 330))}, changes_output=True),
    Request("bad_words", {"bad_words": ["self", "return", "None", "("]}, changes_output=True),
    Request("allowed_token_ids", {"allowed_token_ids": [*range(200, 500)]}, changes_output=True),
    Request("repetition_penalty", {"repetition_penalty": 1.3}, changes_output=True),
    Request("presence_penalty", {"presence_penalty": 2.0}, changes_output=True),
    Request("frequency_penalty", {"frequency_penalty": 1.5}, changes_output=True),
    Request("logprobs", {"logprobs": 3}),
    Request("logprobs=-1", {"logprobs": -1}, note="of the whole vocabulary; `max_logprobs=-1`"),
    Request("flat_logprobs", {"logprobs": 2, "flat_logprobs": True}),
    Request("prompt_logprobs", {"prompt_logprobs": 2}),
    Request("json", structured(json=SCHEMA), changes_output=True),
    Request("json_object", structured(json_object=True), changes_output=True),
    Request("regex", structured(regex=r"return (self|None)\.[a-z]{3,8}"), changes_output=True),
    Request("choice", structured(choice=["return None", "raise Error"]), changes_output=True),
    Request("grammar", structured(grammar=GRAMMAR), changes_output=True),
    Request(
        "repetition_detection",
        {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}, "max_tokens": 48},
        changes_output=True,
    ),
    Request("skip_reading_prefix_cache", {"skip_reading_prefix_cache": True}),
    Request("detokenize=False", {"detokenize": False}),
    Request("skip_special_tokens=False", {"skip_special_tokens": False}),
    Request("seed", {"temperature": 0.9, "seed": 7}, REPEATS, changes_output=True),
    Request(
        "logit_bias",
        {"logit_bias": {300: 4.0}},
        REFUSED,
        r"min_p and logit_bias .* not yet supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "min_p",
        {"temperature": 1.0, "min_p": 0.1},
        REFUSED,
        r"min_p and logit_bias .* not yet supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "logprob_token_ids",
        {"logprob_token_ids": [5, 300, 301]},
        REFUSED,
        r"logprob_token_ids=\[5, 300, 301\] cannot be had .*; ask for logprobs",
        note="vLLM would return other tokens' values or stop",
    ),
    Request(
        "trace_decode_token_ids",
        {"trace_decode_token_ids": [300, 301]},
        REFUSED,
        "trace_decode_token_ids is not supported with spec",
        note="by vLLM, with any speculation",
    ),
    Request(
        "thinking_token_budget",
        {"thinking_token_budget": 5},
        REFUSED,
        "thinking_token_budget",
        note="by vLLM, without a reasoning parser",
    ),
)


def named(expected: str) -> list[Request]:
    """Request features with this outcome."""
    return [r for r in REQUESTS if r.expected == expected]


# Without these a request is what it was, so pairs with them would say nothing new.
_ALONE = {"greedy", "flat_logprobs", "detokenize=False", "skip_special_tokens=False", "logprobs=-1"}


def merged(first: Request, second: Request) -> Mapping[str, Any] | None:
    """Settings of a request that asks for both, or None where they contradict."""
    if first.settings.keys() & second.settings.keys() - {"max_tokens", "temperature", "top_k"}:
        return None
    together = {**first.settings, **second.settings}
    limits = [s["max_tokens"] for s in (first.settings, second.settings) if "max_tokens" in s]
    if limits:
        together["max_tokens"] = min(limits)
    if together.get("min_tokens", 0) > together.get("max_tokens", 16):
        return None
    # No text satisfies both; vLLM then samples from nothing, with or without speculation.
    if "structured" in together and together.keys() & {"bad_words", "allowed_token_ids"}:
        return None
    return together


def pairs() -> list[Request]:
    """Every two request features that can be asked for together."""
    usable = [r for r in named(SAME) if r.name not in _ALONE]
    found = []
    for index, first in enumerate(usable):
        for second in usable[index + 1 :]:
            settings = merged(first, second)
            if settings is not None:
                found.append(Request(f"{first.name} + {second.name}", settings))
    return found


@dataclass(frozen=True)
class Engine:
    """A feature of the engine: started with it, the same requests give the same answers.

    Attributes:
        options: of the engine, with and without speculation.
        speculative: fields of the speculative config beside method, head and number of drafts.
        expected: by runner; one that is absent is not tried there, `note` says why.
        message: of a refusal, as a regular expression.
        alters: the options alone change the answers, so the plain engine needs them, too.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    speculative: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, str] = field(default_factory=lambda: {V1: SAME, V2: SAME})
    message: str = ""
    alters: bool = False
    note: str = ""
