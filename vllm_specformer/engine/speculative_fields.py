"""What a user writes into the speculative config, judged field by field."""

from __future__ import annotations

import reprlib
from itertools import pairwise
from typing import Any

from vllm_specformer.errors import SpecFormerError


class SpeculativeConfigError(SpecFormerError):
    """The speculative config, head and target do not go together."""


# What decides about a draft: vLLM's own rejection sampler, or the request's own noise.
DEFAULT_VERIFICATION = "vllm"
VERIFICATIONS = (DEFAULT_VERIFICATION, "coupled")

SCHEDULE = "num_speculative_tokens_per_batch_size"

# Field -> values that ask for nothing, and why any other cannot be had.
_WITHOUT_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization": ((None,), "a head's weights are not quantised"),
    "use_local_argmax_reduction": (
        (None, False),
        "a head computes whole rows of logits, there is no local argmax to reduce",
    ),
    "disable_padded_drafter_batch": (
        (None, False),
        "vLLM drafts for the whole, padded batch with every method that drafts in one pass",
    ),
    "enable_adaptive_verification": (
        (None, False),
        f"vLLM has it for its method 'dspark' alone; {SCHEDULE!r} adapts a head's drafts to load",
    ),
}


def as_dictionary(given: Any) -> dict[str, Any]:
    """A user's speculative config with fields spelled as vLLM's: `_` for `-`.

    Raises:
        SpeculativeConfigError: it is no object, or a name is no text.
    """
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise SpeculativeConfigError(
            f"speculative config: {reprlib.repr(given)} is not an object of named fields; write "
            '{"method": "specformer", "model": HEAD, "num_speculative_tokens": 4}'
        )
    return {key.replace("-", "_"): value for key, value in given.items()}


def split_verification(speculative: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Take our own field `verification` out of a speculative config, which vLLM would refuse.

    Raises:
        SpeculativeConfigError: unknown value, or one that contradicts another field.
    """
    verification = speculative.get("verification", DEFAULT_VERIFICATION)
    if verification not in VERIFICATIONS:
        raise SpeculativeConfigError(
            f"speculative config: verification={verification!r} must be one of "
            f"{', '.join(map(repr, VERIFICATIONS))}"
        )
    rule = speculative.get("rejection_sample_method", "standard")
    if rule == "block":
        raise SpeculativeConfigError(
            "speculative config: rejection_sample_method='block' does not keep the target's "
            "distribution in this vLLM (it meets the same noise twice, see docs/kernels.md); leave "
            "it out, or set verification='coupled'"
        )
    if verification == "coupled" and rule != "standard":
        raise SpeculativeConfigError(
            f"speculative config: rejection_sample_method={rule!r} is a rule of vLLM's own "
            "verification; leave it out, or set verification='vllm'"
        )
    rest = {key: value for key, value in speculative.items() if key != "verification"}
    return rest, verification


def checked_tokens(tokens: Any, slots: int) -> int:
    """`num_speculative_tokens` as given, or all slots of the head where it is not.

    Raises:
        SpeculativeConfigError: no whole number from 1 to `slots`.
    """
    if tokens is None:
        return slots
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= slots:
        raise SpeculativeConfigError(
            f"speculative config: num_speculative_tokens={tokens!r} must be a whole number from 1 "
            f"to {slots}, the draft slots this head has"
        )
    return tokens


def check_fields(speculative: dict[str, Any]) -> None:
    """Refuse fields that cannot work with a head, and a schedule that vLLM would refuse too late.

    vLLM reads the schedule when the scheduler is built, after the weights are loaded, and looks
    for what `use_local_argmax_reduction` needs in the loaded head.

    Raises:
        SpeculativeConfigError: names field, value and remedy.
    """
    for field, (harmless, reason) in _WITHOUT_EFFECT.items():
        value = speculative.get(field)
        if value not in harmless:
            raise SpeculativeConfigError(
                f"speculative config: {field}={reprlib.repr(value)} has no meaning for a "
                f"SpecFormer head ({reason}); leave it out"
            )
    _check_schedule(speculative.get(SCHEDULE))


def _check_schedule(schedule: Any) -> None:
    """Ranges of batch sizes `[[first, last, tokens], ...]`: whole numbers, from 1 on, in order."""
    if schedule is None:
        return
    problem = _schedule_problem(schedule)
    if problem:
        raise SpeculativeConfigError(
            f"speculative config: {SCHEDULE}={reprlib.repr(schedule)}: {problem}; write ranges of "
            "batch sizes with the tokens to draft, such as [[1, 8, 4], [9, 64, 2], [65, 256, 0]]"
        )


def _schedule_problem(schedule: Any) -> str:
    if not isinstance(schedule, (list, tuple)) or not schedule:
        return "it is no list of ranges"
    for entry in schedule:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            return f"{reprlib.repr(entry)} is not [first, last, tokens]"
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in entry):
            return f"{reprlib.repr(entry)} does not hold three whole numbers"
        first, last, tokens = entry
        if not 1 <= first <= last or tokens < 0:
            return f"{reprlib.repr(entry)} must have 1 <= first <= last and tokens >= 0"
    ranges = sorted((first, last) for first, last, _ in schedule)
    if ranges[0][0] != 1:
        return "the first range must start at 1"
    for (_, last), (first, _) in pairwise(ranges):
        if first <= last:
            return f"two ranges hold the batch size {first}"
    return ""
