"""The settings of `specformer bench`, and what its servers are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from vllm_specformer.errors import SpecFormerError
from vllm_specformer.settings import (
    CommandSettings,
    Directory,
    Drafts,
    File,
    Head,
    JsonObject,
    Positive,
    Revision,
    Spelling,
    TargetOfHead,
    Temperature,
    json_object,
    refuse_own,
)

if TYPE_CHECKING:
    from typing import Self

# Set by an option of ours, or by the comparison itself.
_OWN = ("model", "host", "port", "speculative_config", "served_model_name", "disable_log_stats")


def _by_name(value: Any) -> Any:
    """The texts NAME=JSON as a mapping."""
    if isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for text in value:
        name, equals, config = text.partition("=")
        if not equals or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"expected NAME=JSON, found {text!r}")
        if name in found:
            raise ValueError(f"every NAME may be given once, {name!r} is there twice; rename one")
        found[name] = json_object(config)
    return found


NamedConfigs = Annotated[
    dict[str, dict[str, Any]], BeforeValidator(_by_name), Spelling("NAME=JSON", repeated=True)
]


class BenchSettings(CommandSettings):
    """One comparison under load."""

    GROUPS: ClassVar[dict[str, str]] = {
        "head": "what",
        "arms": "arms",
        "prompts": "load",
        "together": "servers",
    }

    head: Head
    target: TargetOfHead = None
    revision: Revision = None
    out: Directory = Field(description="Directory of the results; a second call goes on.")

    arms: tuple[Annotated[str, Spelling("NAME")], ...] | None = Field(
        None,
        description="What to compare: none, again (a second server without speculation, which "
        "shows how much equal servers differ), k1 to the head's slots, schedule, confident, tree "
        "(V2 runner), ngram, suffix; default: all that can run except again, with the K of "
        "--num-speculative-tokens.",
    )
    num_speculative_tokens: tuple[Drafts, ...] = Field(
        (2, 4, 8), description="Fixed K of the arms that --arms does not name."
    )
    schedule: File | None = Field(
        None,
        description="A plan of `specformer plan --json`, whose predictions are checked too, or a "
        "schedule.",
    )
    speculative_config: NamedConfigs = Field(
        {}, description="A further arm with any --speculative-config of vLLM; may be repeated."
    )

    prompts: tuple[File, ...] = Field(
        description="Distinct texts or conversations, in any form that `distill` takes."
    )
    concurrency: tuple[Positive, ...] = Field(
        (1, 2, 4, 8, 16, 32, 64), description="Requests at a time."
    )
    repeats: Positive = Field(3, description="Rounds of everything.")
    requests_per_slot: Positive = Field(
        4,
        description="Requests of a measurement, as a multiple of --concurrency; at least 8 "
        "requests, at most one for each prompt.",
    )
    max_tokens: Positive = Field(128, description="Longest answer, in tokens.")
    temperature: Temperature = Field(0.0, description="Temperature of the answers.")
    ignore_eos: bool = Field(False, description="Let every answer have --max-tokens tokens.")

    together: bool = Field(
        False,
        description="Keep the servers of all arms up, where memory allows; otherwise one at a "
        "time.",
    )
    engine_args: JsonObject = Field(
        {}, description='Options of `vllm serve` for all arms, such as \'{"dtype": "float32"}\'.'
    )

    @model_validator(mode="after")
    def _not_ours(self) -> Self:
        refuse_own(self.engine_args, _OWN, "the benchmark")
        return self

    def max_model_len(self, otherwise: int) -> int:
        """The longest text the servers take, in tokens."""
        given = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
        return int(given.get("max_model_len", otherwise))

    def requests(self, concurrency: int, available: int) -> int:
        """Requests of a measurement: some for every slot, at least 8 in all, each prompt once.

        Raises:
            SpecFormerError: more slots than prompts.
        """
        if available < concurrency:
            raise SpecFormerError(
                f"--concurrency {concurrency}: needs as many distinct prompts, and --prompts has "
                f"{available} that fit",
                "give more, or a lower concurrency",
            )
        return min(available, max(8, self.requests_per_slot * concurrency))


def server_arguments(engine_args: Mapping[str, Any], max_num_seqs: int) -> list[str]:
    """The options of `vllm serve` that all arms share.

    Prefix caching is off unless asked for, so that a repeated round does the whole work again.
    """
    merged: dict[str, Any] = {"max_num_seqs": max_num_seqs, "enable_prefix_caching": False}
    merged |= {name.replace("-", "_"): value for name, value in engine_args.items()}
    arguments = ["--disable-uvicorn-access-log"]
    for name, value in merged.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return arguments
