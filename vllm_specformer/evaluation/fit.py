"""Does a head fit a target? Everything that can be told from files, without a model in memory.

The rules are those the engine applies when it starts (`engine/checks.py`, `weights.py`); here each
is reported by itself, and what is merely suspicious is reported too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from vllm_specformer import __version__
from vllm_specformer.config import SpecFormerConfig, read_head_config
from vllm_specformer.data.manifest import TargetRecord
from vllm_specformer.distill.encode import load_encoder
from vllm_specformer.engine.checks import checked_tokens
from vllm_specformer.engine.compat.handed_out import handed_out
from vllm_specformer.engine.compat.target_classes import INTERFACE, target_classes
from vllm_specformer.engine.compat.versions import (
    IncompatibleVLLMError,
    check_version,
    installed_vllm,
    supported_range,
    vllm_root,
)
from vllm_specformer.errors import SpecFormerError
from vllm_specformer.evaluation.provenance import read_provenance
from vllm_specformer.head_files import find_head
from vllm_specformer.pairing import check_pair, check_weights, expected_shapes
from vllm_specformer.places import named_target
from vllm_specformer.target.files import find_target, read_json, target_record
from vllm_specformer.target.model import read_target_config
from vllm_specformer.training.report import kind_of_head

Status = Literal["ok", "warning", "misfit"]
OK: Status = "ok"
WARNING: Status = "warning"
MISFIT: Status = "misfit"

_PLAIN_REMEDIES = {
    "configuration": "copy or train the head again",
    "slots": "ask for fewer tokens, or train a head with more --slots",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `remedy` is empty where nothing is to be done."""

    subject: str
    status: Status
    found: str
    remedy: str = ""


def examine(
    head: Path, target: str | None, revision: str | None = None, num_tokens: int | None = None
) -> list[Finding]:
    """All findings about a head and a target, the one that the head names if none is given.

    What depends on a file that cannot be used is left out.
    """
    findings: list[Finding] = []
    files = _try(findings, "configuration", lambda: find_head(head))
    config = files and _try(findings, "configuration", lambda: read_head_config(files))
    if config is None:
        return findings
    findings.append(Finding("configuration", OK, kind_of_head(config)))
    findings += _weights(files, config)
    findings += _slots(config, num_tokens)
    findings += _vllm(config)
    name = target or _try(findings, "target", lambda: named_target(files, config, revision))
    place = name and _try(findings, "target", lambda: find_target(name, revision))
    if place is None:
        return findings
    directory, commit = place
    hf_config = _try(findings, "target", lambda: read_target_config(directory))
    if hf_config is not None:
        findings += _shapes(config, hf_config, name)
        findings += _context(config, hf_config)
        findings += _dtype(files, hf_config)
    findings += _tokenizer(config, directory)
    record = _try(findings, "target", lambda: target_record(name, directory, commit))
    if record is not None:
        findings += _origin(files, record)
    return findings


def _try(findings: list[Finding], subject: str, read: Callable[[], Any]) -> Any:
    """What `read` gives; where it cannot, None and a misfit."""
    try:
        return read()
    except SpecFormerError as error:
        findings.append(_misfit(subject, error))
        return None


def _misfit(subject: str, error: SpecFormerError) -> Finding:
    remedy = error.remedy or _PLAIN_REMEDIES.get(subject, "put it right")
    return Finding(subject, MISFIT, error.problem, remedy)


def _weights(head: Path, config: SpecFormerConfig) -> Iterator[Finding]:
    try:
        check_weights(head, config)
    except SpecFormerError as error:
        yield _misfit("weights", error)
        return
    yield Finding("weights", OK, f"{len(expected_shapes(config))} tensors, complete and finite")


def _slots(config: SpecFormerConfig, num_tokens: int | None) -> Iterator[Finding]:
    if num_tokens is not None:
        try:
            checked_tokens(num_tokens, config.num_draft_slots)
        except SpecFormerError as error:
            yield _misfit("slots", error)
            return
    fewer = "computes only those" if config.nested_slots else "computes all and cuts"
    yield Finding(
        "slots",
        OK,
        f"num_speculative_tokens from 1 to {config.num_draft_slots}; asking for fewer {fewer}",
    )


def _vllm(config: SpecFormerConfig) -> Iterator[Finding]:
    """The installed vLLM, and whether its class for the target hands out hidden states."""
    try:
        name, version = installed_vllm()
        check_version(version)
        classes = {item.architecture: item for item in target_classes(vllm_root())}
    except IncompatibleVLLMError as error:
        yield Finding("vLLM", WARNING, str(error), "`specformer doctor` says more")
        return
    yield Finding("vLLM", OK, f"{version} ({name}), tested: {supported_range()}")
    architecture = config.target_architecture
    known = classes.get(architecture)
    hooks, layers = config.aux_hidden_state_layer_ids, config.target_num_layers
    handed = handed_out(vllm_root(), known.module, known.name) if known is not None else None
    if known is None:
        yield Finding(
            "vLLM class",
            MISFIT,
            f"vLLM {version} has no class for {architecture}",
            "serve with a vLLM that has one; `specformer families` lists those that can be used",
        )
    elif not known.hands_out_states:
        yield Finding(
            "vLLM class",
            MISFIT,
            f"{known.name} does not hand out hidden states (it lacks {INTERFACE})",
            "serve this model without speculation; `specformer families` lists those that can",
        )
    elif handed is not None and (lacking := handed.lacking(hooks, layers)):
        yield Finding(
            "vLLM class",
            MISFIT,
            f"{known.name} hands out no hidden state {' and '.join(map(str, lacking))}",
            f"train a head with --hooks {','.join(map(str, handed.default_hooks(layers)))}",
        )
    else:
        yield Finding("vLLM class", OK, f"{known.name} hands out hidden states")


def _shapes(config: SpecFormerConfig, target: PreTrainedConfig, name: str) -> Iterator[Finding]:
    try:
        check_pair(config, target, name)
    except SpecFormerError as error:
        yield _misfit("shapes", error)
        return
    layers = config.target_num_layers
    yield Finding(
        "shapes",
        OK,
        f"{config.target_architecture}, {layers} layers of {config.hidden_size}, vocabulary "
        f"{config.vocab_size:,}, in head and target",
    )
    ids = list(config.aux_hidden_state_layer_ids)
    last = f"; {layers} is the state before the final norm" if ids[-1] == layers else ""
    yield Finding("hooks", OK, f"{ids} of 0 to {layers}{last}")


def _context(config: SpecFormerConfig, target: PreTrainedConfig) -> Iterator[Finding]:
    trained = config.max_position_embeddings
    served = target.get_text_config().max_position_embeddings
    if served > trained:
        yield Finding(
            "context",
            WARNING,
            f"the target takes {served:,} tokens, the head was made for {trained:,}",
            f"expect fewer accepted drafts beyond, or serve with --max-model-len {trained}",
        )
    else:
        yield Finding("context", OK, f"the head covers the target's {served:,} tokens")


def _dtype(head: Path, target: PreTrainedConfig) -> Iterator[Finding]:
    own = read_json(head / "config.json").get("dtype")
    other = str(target.dtype or target.get_text_config().dtype).removeprefix("torch.")
    if own == other:
        yield Finding("dtype", OK, f"{own}, in head and target")
    else:
        yield Finding(
            "dtype",
            WARNING,
            f"the head is {own}, the target {other}",
            "vLLM serves both in one dtype, by default the target's; measure with that one",
        )


def _tokenizer(config: SpecFormerConfig, directory: Path) -> Iterator[Finding]:
    try:
        size = len(load_encoder(directory, chats=False).tokenizer)
    except SpecFormerError as error:
        yield _misfit("tokenizer", error)
        return
    if size > config.vocab_size:
        yield Finding(
            "tokenizer",
            MISFIT,
            f"it has {size:,} tokens, the head's vocabulary {config.vocab_size:,}",
            "use the tokenizer that belongs to the target",
        )
    else:
        yield Finding("tokenizer", OK, f"{size:,} tokens of {config.vocab_size:,}")


def _origin(head: Path, target: TargetRecord) -> Iterator[Finding]:
    """Was the head trained for these very files, and by which release?"""
    try:
        provenance = read_provenance(head)
    except SpecFormerError as error:
        yield _misfit("provenance", error)
        return
    if provenance is None:
        yield Finding(
            "provenance",
            WARNING,
            "the head has no provenance.json, so nothing says which weights it was trained for",
            "measure it on this target: specformer eval HEAD --serve",
        )
        return
    trained = provenance["target"]
    if trained["fingerprint"] != target.fingerprint:
        yield Finding(
            "fingerprint",
            MISFIT,
            f"trained for {trained['name_or_path']} ({trained['fingerprint'][:12]}), this target "
            f"is {target.fingerprint[:12]}: other weights, another tokenizer or config.json",
            "use the target it was trained for, or train a head for this one. For a fine-tuned or "
            "quantised copy it stays lossless; what it gains, specformer eval HEAD --serve tells",
        )
    else:
        yield Finding(
            "fingerprint", OK, f"{target.fingerprint[:12]}: the target it was trained for"
        )
    release = provenance["versions"].get("vllm-specformer")
    if release != __version__:
        yield Finding(
            "release",
            WARNING,
            f"trained with vllm-specformer {release}, installed is {__version__}",
            "if drafts are not accepted, compare with specformer eval HEAD --serve",
        )
