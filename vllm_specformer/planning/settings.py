"""The settings of `specformer plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from vllm_specformer.planning.choose import MARGIN
from vllm_specformer.settings import (
    CommandSettings,
    Drafts,
    File,
    Flag,
    Head,
    JsonObject,
    Positive,
    ResultFile,
    Revision,
    Seconds,
    Share,
    Spelling,
    TargetOfHead,
    Temperature,
    refuse_own,
)

if TYPE_CHECKING:
    from typing import Self

# Set by the plan itself.
_OWN = ("model", "speculative_config", "disable_log_stats")
_WEIGHT_BYTES = (0.5, 1, 2, 4)
_A_FORMAT = f"one of {', '.join(map(str, _WEIGHT_BYTES))}"


def _of_a_format(size: float) -> float:
    if size not in _WEIGHT_BYTES:
        raise ValueError(f"expected {_A_FORMAT}, found {size:g}")
    return size


class PlanSettings(CommandSettings):
    """One plan: measured here, taken from a benchmark, or on paper."""

    GROUPS: ClassVar[dict[str, str]] = {
        "head": "what",
        "eval": "acceptance",
        "prompts": "costs, measured on this machine",
        "bench": "costs, measured under load",
        "chip": "costs, on paper",
        "margin": "results",
    }

    head: Head | None = Field(
        None,
        description="Directory of the head; on paper it may be left out for one of the default "
        "shape.",
    )
    target: TargetOfHead = None
    revision: Revision = None
    batch: tuple[Positive, ...] = Field((1, 2, 4, 8, 16, 32, 64), description="Requests in a step.")
    num_speculative_tokens: tuple[Drafts, ...] = Field(
        (2, 4, 8), description="Drafted tokens to choose from, besides none."
    )

    eval: File | None = Field(
        None,
        description="What `specformer eval --json` wrote; trees are planned where it has them "
        "(--tree-nodes).",
    )
    accepted: tuple[Share, ...] = Field(
        (), description="Instead: the share of drafts accepted up to position 1, 2, ..."
    )
    temperature: Temperature = Field(0.0, description="Temperature whose answers in --eval count.")

    prompts: tuple[File, ...] = Field(
        (),
        description="Texts to measure with, in any form that `distill` takes; without --eval also "
        "the source of the acceptance: give some that the head was not trained on.",
    )
    max_prompts: Positive = Field(64, description="Texts in use.")
    max_tokens: Positive = Field(128, description="Longest answer, in tokens.")
    cycles: Positive = Field(3, description="Rounds over everything.")
    steps: Positive = Field(8, description="Steps to time in a row.")
    seconds: Seconds = Field(
        0.5,
        description="Least seconds to time at each batch size and K in a round; short steps are "
        "timed again until then.",
    )
    engine_args: JsonObject = Field(
        {}, description="Arguments of vLLM's engine, as the server will have them."
    )

    bench: File | None = Field(
        None,
        description="bench.json of `specformer bench` with fixed numbers of drafts: choose by it, "
        "measure nothing.",
    )

    chip: Annotated[str, Spelling("NAME")] | None = Field(
        None, description="a100, h100, h200, b200 or mi300x: compute, measure nothing."
    )
    bandwidth: Share = Field(1.0, description="Share of the peak bandwidth reached.")
    arithmetic: Share = Field(1.0, description="Share of the peak arithmetic reached.")
    context: Positive = Field(1024, description="Tokens of a request in the cache.")
    weight_bytes: Annotated[
        float, AfterValidator(_of_a_format), Spelling("{0.5,1,2,4}", _A_FORMAT)
    ] = Field(2.0, description="Bytes of a weight of the target: 1 for fp8.")

    margin: Share = Field(MARGIN, description="Smallest gain to draft for.")
    json_file: Annotated[ResultFile, Flag(name="--json")] | None = Field(
        None, description="Write the plan, for `bench` too."
    )
    plot: ResultFile | None = Field(None, description="Draw it (PNG).")

    @model_validator(mode="after")
    def _not_ours(self) -> Self:
        refuse_own(self.engine_args, _OWN, "the plan")
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        """Refuse a temperature that nothing would look at."""
        if self.temperature and self.eval is None:
            raise ValueError(
                f"--temperature {self.temperature:g}: chooses among the answers of --eval, and "
                "without it acceptance is that of greedy answers; add --eval FILE of `specformer "
                f"eval --temperature {self.temperature:g} --json FILE`, or leave it out"
            )
        return self
