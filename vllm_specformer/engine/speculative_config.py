"""What a user writes into the speculative config, judged field by field."""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass, fields
from typing import Any

from vllm_specformer.batch_ranges import closed, is_count, ranges_problem
from vllm_specformer.errors import SpeculativeConfigError
from vllm_specformer.names import describes_head

# What decides about a draft: vLLM's own rejection sampler, or the request's own noise.
DEFAULT_VERIFICATION = "vllm"
VERIFICATIONS = (DEFAULT_VERIFICATION, "coupled")

SCHEDULE = "num_speculative_tokens_per_batch_size"
CONFIDENCE = "draft_confidence_threshold"
TREE = "tree_nodes"
TREE_SCHEDULE = "tree_nodes_per_batch_size"
ADAPTIVE = "enable_adaptive_verification"
MAX_TREE_NODES = 63  # the root and they are the bits of a word

# vLLM's rules of accepting a draft: the lossless one, and the one that measures at a chosen
# acceptance whatever the target says. Any other is refused, also one that a later vLLM brings.
_STANDARD, _SYNTHETIC = "standard", "synthetic"
_LOSSY = {
    "block": "does not keep the target's distribution in this vLLM (it meets the same noise twice, "
    "see docs/verification.md)",
    "fly": "accepts drafts that the target would not have chosen",
}

# Our own fields, which vLLM does not know.
_OWN = ("verification", CONFIDENCE, TREE, TREE_SCHEDULE)

# Ranges of batch sizes with a threshold each: (first, last, threshold), without gaps.
Thresholds = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class TreeSettings:
    """Trees of candidates: most nodes, and the head's slots, which are their depth."""

    nodes: int
    slots: int


@dataclass(frozen=True)
class OwnFields:
    """What our own fields of a speculative config ask for; see `split_own_fields`."""

    verification: str = DEFAULT_VERIFICATION
    confidence: Thresholds | None = None
    tree_nodes: int | None = None
    tree_schedule: tuple[tuple[int, int, int], ...] | None = None


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
}


def as_dictionary(given: Any) -> dict[str, Any]:
    """A user's speculative config with fields spelled as vLLM's: `_` for `-`.

    Raises:
        SpeculativeConfigError: it is no object, or a name is no text.
    """
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise SpeculativeConfigError(
            f"speculative config: {reprlib.repr(given)} is not an object of named fields",
            'write {"method": "specformer", "model": HEAD, "num_speculative_tokens": 4}',
        )
    return {key.replace("-", "_"): value for key, value in given.items()}


def split_own_fields(speculative: dict[str, Any]) -> tuple[dict[str, Any], OwnFields]:
    """Take our own fields out of a speculative config, which vLLM would refuse.

    Raises:
        SpeculativeConfigError: unknown value, or one that contradicts another field.
    """
    nodes = _tree_nodes(speculative)
    own = OwnFields(
        _verification(speculative, DEFAULT_VERIFICATION if nodes is None else "coupled"),
        _thresholds(speculative),
        nodes,
        None if nodes is None else _tree_schedule(speculative.get(TREE_SCHEDULE), nodes),
    )
    return {key: value for key, value in speculative.items() if key not in _OWN}, own


def _tree_nodes(speculative: dict[str, Any]) -> int | None:
    """Nodes of a tree, or None; with what contradicts them refused."""
    nodes = speculative.get(TREE)
    if nodes is None:
        if speculative.get(TREE_SCHEDULE) is not None:
            raise SpeculativeConfigError(
                f"speculative config: {TREE_SCHEDULE} says how many of {TREE!r} to draft by batch "
                "size, and that field is missing",
                f"set {TREE!r} to the most nodes of a tree",
            )
        return None
    if not is_count(nodes) or not 1 <= nodes <= MAX_TREE_NODES:
        raise SpeculativeConfigError(
            f"speculative config: {TREE}={reprlib.repr(nodes)} must be a whole number from 1 to "
            f"{MAX_TREE_NODES}, the candidates of a request that one forward verifies"
        )
    refused = {
        "verification": (speculative.get("verification", "coupled") != "coupled", "coupled"),
        SCHEDULE: (speculative.get(SCHEDULE) is not None, f"{TREE_SCHEDULE}"),
        CONFIDENCE: (speculative.get(CONFIDENCE) is not None, f"{TREE_SCHEDULE}"),
        ADAPTIVE: (bool(speculative.get(ADAPTIVE)), f"{TREE_SCHEDULE}"),
        "draft_sample_method": (speculative.get("draft_sample_method") == "greedy", ""),
    }
    for field, (is_given, instead) in refused.items():
        if is_given:
            raise SpeculativeConfigError(
                f"speculative config: {field}={reprlib.repr(speculative[field])} cannot be "
                f"combined with {TREE}",
                f"leave it out{f' (trees have {instead!r})' if instead else ''}",
            )
    return int(nodes)


def _tree_schedule(value: Any, nodes: int) -> tuple[tuple[int, int, int], ...] | None:
    """Ranges of batch sizes with the nodes to draft in each, 0 for none."""
    if value is None:
        return None

    def is_part(count: Any) -> bool:
        return is_count(count) and count <= nodes

    problem = ranges_problem(value, "nodes", is_part)
    if problem:
        raise SpeculativeConfigError(
            f"speculative config: {TREE_SCHEDULE}={reprlib.repr(value)}: {problem}",
            f"write ranges of batch sizes with the nodes to draft, at most {TREE}={nodes}, such as "
            f"[[1, 8, {nodes}], [9, 64, 0]]",
        )
    return tuple((first, last, int(count)) for first, last, count in closed(value))


def _verification(speculative: dict[str, Any], default: str) -> str:
    verification = speculative.get("verification", default)
    if verification not in VERIFICATIONS:
        raise SpeculativeConfigError(
            f"speculative config: verification={verification!r} must be one of "
            f"{', '.join(map(repr, VERIFICATIONS))}"
        )
    rule = speculative.get("rejection_sample_method", _STANDARD)
    if rule not in (_STANDARD, _SYNTHETIC):
        reason = _LOSSY.get(rule) if isinstance(rule, str) else None
        raise SpeculativeConfigError(
            f"speculative config: rejection_sample_method={reprlib.repr(rule)} "
            f"{reason or 'is not known to keep the target distribution'}",
            "leave it out",
        )
    if verification == "coupled" and rule != _STANDARD:
        raise SpeculativeConfigError(
            f"speculative config: rejection_sample_method={rule!r} is a rule of vLLM's own "
            "verification",
            "leave it out, or set verification='vllm'" if default == "vllm" else "leave it out",
        )
    return str(verification)


_SIZES_BEYOND = 1 << 30


def _thresholds(speculative: dict[str, Any]) -> Thresholds | None:
    """A threshold for all batch sizes, or ranges with one each."""
    value = speculative.get(CONFIDENCE)
    if value is None:
        return None
    if speculative.get(ADAPTIVE):
        raise SpeculativeConfigError(
            f"speculative config: {CONFIDENCE}={reprlib.repr(value)} cannot be combined "
            f"with {ADAPTIVE}, which decides by measured costs what a threshold decides by your "
            "number",
            "leave one of the two out",
        )
    if _is_threshold(value):
        return ((1, _SIZES_BEYOND, float(value)),)
    problem = ranges_problem(value, "threshold", _is_threshold)
    if problem:
        raise SpeculativeConfigError(
            f"speculative config: {CONFIDENCE}={reprlib.repr(value)}: {problem}",
            "write a number "
            "from 0 to 1, or ranges of batch sizes with one each, such as "
            "[[1, 8, 0.1], [9, 64, 0.4]]",
        )
    return tuple((first, last, float(bar)) for first, last, bar in closed(value))


def _is_threshold(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


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


def with_tree(speculative: dict[str, Any], own: OwnFields) -> dict[str, Any]:
    """A judged config as vLLM must see it: to vLLM, the nodes of a tree are its drafts.

    Trees are drafted with the request's own noise, so vLLM is to keep no draft probabilities.
    """
    if own.tree_nodes is None:
        return speculative
    schedule = {} if own.tree_schedule is None else {SCHEDULE: list(map(list, own.tree_schedule))}
    return (
        speculative
        | schedule
        | {
            "num_speculative_tokens": own.tree_nodes,
            "draft_sample_method": "greedy",
        }
    )


def check_fields(speculative: dict[str, Any]) -> None:
    """Refuse fields that nobody knows or that cannot work with a head, and a bad schedule.

    vLLM reads the schedule when the scheduler is built, after the weights are loaded, and looks
    for what `use_local_argmax_reduction` needs in the loaded head.

    Raises:
        SpeculativeConfigError: names field, value and remedy.
    """
    _check_names(speculative)
    for field, (harmless, reason) in _WITHOUT_EFFECT.items():
        value = speculative.get(field)
        if value not in harmless:
            raise SpeculativeConfigError(
                f"speculative config: {field}={reprlib.repr(value)} has no meaning for a "
                f"SpecFormer head ({reason})",
                "leave it out",
            )
    adaptive = speculative.get(ADAPTIVE)
    if adaptive is not None and not isinstance(adaptive, bool):
        raise SpeculativeConfigError(
            f"speculative config: {ADAPTIVE}={reprlib.repr(adaptive)} must be true or false"
        )
    _check_schedule(speculative.get(SCHEDULE))


def _check_names(speculative: dict[str, Any]) -> None:
    """vLLM's fields, and our own, which `split_own_fields` may not have taken out yet."""
    from vllm.config import SpeculativeConfig

    known = [*(field.name for field in fields(SpeculativeConfig)), *_OWN]
    for name, value in speculative.items():
        if name not in known:
            similar = difflib.get_close_matches(name, known, 1)
            raise SpeculativeConfigError(
                f"speculative config: field {name!r} with value {reprlib.repr(value)} is unknown",
                f"did you mean {similar[0]!r}?" if similar else "remove it",
            )


def _check_schedule(schedule: Any) -> None:
    """Ranges of batch sizes `[[first, last, tokens], ...]`: whole numbers, from 1 on, in order."""
    if schedule is None:
        return
    problem = ranges_problem(schedule, "tokens", is_count)
    if problem:
        raise SpeculativeConfigError(
            f"speculative config: {SCHEDULE}={reprlib.repr(schedule)}: {problem}",
            "write ranges of "
            "batch sizes with the tokens to draft, such as [[1, 8, 4], [9, 64, 2], [65, 256, 0]]",
        )


def drafts_with_head(speculative_config: Any) -> bool:
    """Whether vLLM's speculative config, if there is one, drafts with a SpecFormer head."""
    architectures = getattr(_head_config(speculative_config), "architectures", None)
    return describes_head({"architectures": architectures})


def verifies_coupled(speculative_config: Any) -> bool:
    """Whether the user asked for coupled verification."""
    return getattr(_head_config(speculative_config), "specformer_verification", "") == "coupled"


def tree_settings(speculative_config: Any) -> TreeSettings | None:
    """Trees of candidates, where the user asked for them."""
    tree = getattr(_head_config(speculative_config), "specformer_tree", None)
    return None if tree is None else TreeSettings(**tree)


def confidence_ranges(speculative_config: Any) -> Any:
    """Thresholds below which drafts are left out, by batch size; None where nobody asked."""
    return getattr(_head_config(speculative_config), "specformer_confidence", None)


def threshold_at(ranges: Thresholds, batch: int) -> float:
    """The threshold for a step of so many requests; beyond the last range its own goes on."""
    return next((bar for _, last, bar in ranges if batch <= last), ranges[-1][2])


def _head_config(speculative_config: Any) -> Any:
    return getattr(getattr(speculative_config, "draft_model_config", None), "hf_config", None)
