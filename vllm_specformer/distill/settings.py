"""The settings of `specformer distill`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from vllm_specformer.settings import (
    CommandSettings,
    Count,
    Directory,
    File,
    JsonObject,
    Positive,
    Revision,
    Share,
    Spelling,
    Temperature,
    TopP,
    Whole,
)

if TYPE_CHECKING:
    from typing import Self

OFFLINE = "offline"


class DistillSettings(CommandSettings):
    """One distillation."""

    GROUPS: ClassVar[dict[str, str]] = {
        "target": "what",
        "temperature": "how answers are drawn",
        "engine": "what answers",
    }

    target: str = Field(description="Directory or hub name of the target.")
    revision: Revision = None
    prompts: tuple[File, ...] = Field(
        description="JSONL, JSON or Parquet with messages, conversations, prompt or text."
    )
    out: Directory = Field(description="Directory of the result; the same command continues it.")
    max_prompts: Positive | None = Field(
        None, description="Use only so many of the prompts, drawn by --seed."
    )
    max_bad_lines: Count | None = Field(
        None,
        description="Malformed records that may be left out; default: 1%, 10 in small files.",
    )
    shard_size: Positive | None = Field(
        None,
        description="Prompts per file; an interruption costs at most one file. Default: 1000, 128 "
        "if vLLM runs on a CPU; a continued run keeps its own.",
    )

    temperature: Temperature = Field(0.0, description="Temperature of the answers; 0: greedy.")
    sampled_share: Share = Field(
        0.25, description="Share of the prompts answered at --sampled-temperature instead."
    )
    sampled_temperature: Temperature = Field(1.0, description="Temperature of those.")
    top_p: TopP = Field(1.0, description="Top-p, where the temperature is not 0.")
    max_tokens: Positive = Field(1024, description="Longest answer, in tokens.")
    seed: Whole = Field(0, description="Decides which prompts and answers are drawn.")
    chat_template: File | None = Field(
        None, description="Jinja template to use instead of the target's."
    )
    chat_template_args: JsonObject = Field(
        {}, description="Variables for the template, such as '{\"enable_thinking\": false}'."
    )

    engine: Annotated[str, Spelling("offline|URL")] = Field(
        OFFLINE, description="'offline', vLLM in this process, or an OpenAI-compatible server."
    )
    dtype: str = Field("auto", description="Arithmetic of the offline engine.")
    max_model_len: Positive | None = Field(
        None, description="Context in tokens, if shorter than the model's."
    )
    engine_args: JsonObject = Field(
        {},
        description="More arguments for the offline engine, such as "
        "'{\"tensor_parallel_size\": 2}'.",
    )
    served_model: Annotated[str, Spelling("NAME")] | None = Field(
        None, description="The target's name on the server; default: as in --target."
    )
    concurrency: Positive = Field(64, description="Requests that a server gets at a time.")

    @property
    def offline(self) -> bool:
        return self.engine == OFFLINE

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        """Refuse settings that would have no effect."""
        idle = {"--engine-args": self.engine_args, "--dtype": self.dtype != "auto"}
        other = {"--served-model": self.served_model}
        for name, given in (other if self.offline else idle).items():
            if given:
                raise ValueError(f"{name} has no effect with --engine {self.engine}; leave it out")
        return self
