"""Request features, tried on engines with and without speculation and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from support.engines import Job, prompts
from support.matrix.features import Request

MAX_TOKENS = 16
# Of engines that are to serve every request of the table.
OPTIONS: dict[str, Any] = {
    "max_logprobs": -1,
    # Otherwise the little target fills its JSON with spaces until max_tokens.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
# Sums in another order (other batch, other rows) move fp32 log-probabilities by about 1e-5.
TOLERANCE = 1e-4


def sampling_params(request: Request) -> SamplingParams:
    settings = dict(request.settings)
    if "structured" in settings:
        settings["structured_outputs"] = StructuredOutputsParams(**settings.pop("structured"))
    if "repetition_detection" in settings:
        settings["repetition_detection"] = RepetitionDetectionParams(
            **settings["repetition_detection"]
        )
    return SamplingParams(**({"temperature": 0, "max_tokens": MAX_TOKENS} | settings))


def job(requests: Sequence[Request], prompts_each: int) -> Job:
    """All requests in one submission, each on prompts of its own as far as there are enough."""
    texts, params = [], []
    for index, request in enumerate(requests):
        for n in range(prompts_each):
            texts.append(prompts()[(index * prompts_each + n) % len(prompts())])
            params.append(sampling_params(request))
    return Job(texts, params)


def by_request(
    requests: Sequence[Request], outputs: Sequence[RequestOutput]
) -> dict[str, list[RequestOutput]]:
    each = len(outputs) // len(requests)
    return {r.name: list(outputs[i * each : (i + 1) * each]) for i, r in enumerate(requests)}


def difference(found: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> str:
    """What the answers to one feature's requests differ in; empty where they are the same."""
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            for name in ("token_ids", "text", "finish_reason", "stop_reason"):
                mine, other = getattr(a, name), getattr(b, name)
                if list(mine or ()) != list(other or ()) if name == "token_ids" else mine != other:
                    return f"{name} {mine!r}, without speculation {other!r}"
            if _apart(a.logprobs, b.logprobs):
                return "log-probabilities"
        if _apart(ours.prompt_logprobs, theirs.prompt_logprobs):
            return "log-probabilities of the prompt"
    return ""


def _apart(found: Any, expected: Any) -> bool:
    """Whether two lists of `{token: logprob}` differ; tokens that tie may change places."""
    if found is None or expected is None:
        return found is not expected
    if len(found) != len(expected):
        return True
    for a, b in zip(found, expected, strict=True):
        mine, other = ({t: v.logprob for t, v in (p or {}).items()} for p in (a, b))
        if len(mine) != len(other):
            return True
        pairs = zip(sorted(mine.values()), sorted(other.values()), strict=True)
        if any(abs(x - y) > TOLERANCE for x, y in pairs):
            return True
        if any(abs(mine[t] - other[t]) > TOLERANCE for t in mine.keys() & other.keys()):
            return True
    return False


def refusal(llm: LLM, request: Request) -> str:
    """vLLM's message when it refuses the request; empty when it answers."""
    try:
        job([request], 1).run(llm)
    except (ValueError, VLLMValidationError) as error:
        return str(error)
    return ""
