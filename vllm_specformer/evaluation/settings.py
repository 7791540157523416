"""The settings of `specformer eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vllm_specformer.settings import (
    CommandSettings,
    Count,
    Directory,
    Drafts,
    File,
    Flag,
    Head,
    JsonObject,
    Nodes,
    Positive,
    ResultFile,
    Revision,
    TargetOfHead,
    Temperature,
    Whole,
)

if TYPE_CHECKING:
    from typing import Self


class EvalSettings(CommandSettings):
    """One evaluation."""

    GROUPS: ClassVar[dict[str, str]] = {
        "head": "what",
        "num_speculative_tokens": "how",
        "serve": "the engine",
        "json_file": "results",
    }

    head: Head
    target: TargetOfHead = None
    revision: Revision = None
    prompts: tuple[File, ...] = Field(
        (),
        description="Prompts the head has not seen, in any form that `distill` takes; the target "
        "answers the first question of each. This or --data is needed.",
    )
    data: Directory | None = Field(
        None,
        description="Distilled answers; if the head was trained on them, the part held out.",
    )
    max_prompts: Positive = Field(256, description="Texts in use.")
    max_bad_lines: Count | None = Field(None, description="As for `distill`.")
    chat_template: File | None = Field(None, description="As for `distill`.")
    chat_template_args: JsonObject = Field({}, description="As for `distill`.")

    num_speculative_tokens: tuple[Drafts, ...] | None = Field(
        None,
        description="Drafted tokens per step; default: all from 1 to the head's slots, in the "
        "engine 4 and all.",
    )
    temperature: tuple[Temperature, ...] | None = Field(
        None,
        description="Temperatures of the answers; default: 0, with --data those it has, unless "
        "--serve makes new ones.",
    )
    tree_nodes: tuple[Nodes, ...] | None = Field(
        None,
        description="Also replay trees with so many drafted nodes (docs/trees.md).",
    )
    fit_tree_ranking: bool = Field(
        False,
        description="Find the temperatures by which a tree's nodes rank, per slot, on these "
        "answers, for greedy and for sampled ones, and write them to the head's config.json.",
    )
    calibrate: bool = Field(
        False,
        description="Fit on these answers how probably drafts are accepted, given how sure the "
        "head is of them, for greedy and for sampled requests, and write it to the head's "
        "config.json (docs/confidence.md).",
    )
    likeliest: bool = Field(
        False,
        description="Record how many accepted drafts remain if only the likeliest are verified; "
        "from that `plan` predicts adaptive verification.",
    )
    max_tokens: Positive = Field(128, description="Longest answer, in tokens.")
    seed: Whole = Field(0, description="Decides which prompts and answers are drawn.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of target and head, in the engine too; auto: the target's on a "
        "GPU, else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to evaluate.")

    serve: Annotated[bool, Flag(formerly="--engine")] = Field(
        False,
        description="Let vLLM answer the prompts with the head, and compare its steps with the "
        "replay's; exit code 1 if they differ by more than 2%.",
    )
    engine_args: JsonObject = Field({}, description="Arguments of vLLM's engine, as for `distill`.")

    json_file: Annotated[ResultFile, Flag(name="--json")] | None = Field(
        None, description="Write all metrics."
    )
    plot: ResultFile | None = Field(None, description="Draw them (PNG).")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        self.check_alternatives("prompts", "data", required=True)
        return self
