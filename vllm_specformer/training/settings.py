"""The settings of `specformer train`: described once, checked, and kept with the result.

All of them decide what comes out (apart from the paths, see `PLACES`), so a directory remembers
them and a continued run must repeat them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vllm_specformer.head_fields import MAX_SLOT_LAYERS, MAX_SLOTS
from vllm_specformer.serving.hidden_states import OWN
from vllm_specformer.serving.states_server import is_url
from vllm_specformer.settings import (
    CommandSettings,
    Directory,
    Flag,
    JsonObject,
    Revision,
    Spelling,
    refuse_own,
)
from vllm_specformer.shapes import MARKOV_RANK
from vllm_specformer.training.slot_loss import Mix

# They may move between the beginning of a run and its continuation; a run remembers what is there.
PLACES = ("target", "data", "out", "finish", "init")
# May change then, too: they decide about speed and rounding only.
OF_SPEED = ("cache_states", "states_disk", "engine_args", "engine_devices", "served_model")
SLOT_DECAY = 0.85
REACH = "reach"  # as --slot-weights
COSINE_FLOOR = 0.02  # of the highest rate: 5e-4 falls to 1e-5, as in the paper
DECAY_SHARE = 0.5  # of the steps of a trapezoid
KL_WEIGHT = 0.5  # of the default head; docs/ablation.md has the measurements
LEARNING_RATES = {"adamw": 5e-4, "muon": 0.01}
VECTOR_SHARE = 0.2  # of the rate of the matrices
# Per text. A CPU spends most of a step on the target's pass, so it makes more of each.
GPU_ANCHORS, CPU_ANCHORS = 32, 128
# Tokens scored in a step. A GPU has arithmetic to spare, and was not measured.
GPU_SAMPLE, CPU_SAMPLE = 0, 4096
EVAL_TEXTS = 64
# Options about the head's shape, which a target leaves open, and the fields of its configuration
# that they decide.
SHAPE_FIELDS = {
    "slots": "num_draft_slots",
    "slot_layers": "num_slot_layers",
    "markov_rank": "markov_rank",
    "markov_gate": "markov_gate",
    "draft_vocab": "draft_vocab_size",
    "hooks": "aux_hidden_state_layer_ids",
    "slot_mask": "slot_mask",
    "context_window": "context_window",
    "context_sinks": "context_sinks",
    "bonus_embedding": "use_bonus_embedding",
    "nested_slots": "nested_slots",
    "intermediate_size": "intermediate_size",
}


def _list(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


IntList = Annotated[tuple[int, ...], BeforeValidator(_list)]


class TrainSettings(CommandSettings):
    """One training. A field that is None is decided by the preset, the target or the machine."""

    GROUPS: ClassVar[dict[str, str]] = {
        "target": "what",
        "preset": "the head",
        "epochs": "how long, in what portions",
        "optimizer": "optimiser",
        "slot_weights": "objective",
        "eval_share": "evaluation, log, checkpoints",
        "seed": "machine",
    }

    target: str = Field("", description="Model the head is for: a directory or a name on the hub.")
    data: tuple[str, ...] = Field(
        (), description="Directories that `specformer distill` wrote for this target."
    )
    out: str = Field("", description="Directory of the run; in the end it is the head.")
    finish: Directory | None = Field(
        None,
        description="Make a head of this interrupted run as it stands, instead of a training; "
        "with --out in another directory, so that the run can still be continued.",
    )
    revision: Revision = None
    target_name: str | None = Field(
        None,
        description="Where the head finds its target: an absolute path, a path from the head's "
        "directory on, or a name of the hub; default: where --target is.",
    )
    partial_data: Annotated[bool, Flag(negated=True)] = Field(
        False, description="Train on what an unfinished distillation has written so far."
    )

    init: Directory | None = Field(
        None,
        description="Begin with the weights of this head, of the same target, instead of random "
        "ones; its shape and draft vocabulary are kept.",
    )
    preset: Literal["default", "paper"] = Field("default", description="Kind of head.")
    slots: int = Field(8, ge=1, le=MAX_SLOTS, description="K, tokens drafted in one pass.")
    slot_layers: int | None = Field(
        None, ge=1, le=MAX_SLOT_LAYERS, description="Layers over the slots; default: 1."
    )
    markov_rank: int | None = Field(
        None,
        ge=0,
        description="Rank of the Markov term, which the token drafted before a slot adds to its "
        "logits; 0: none; default: 64, none for the paper's head.",
    )
    markov_gate: bool | None = Field(
        None,
        description="Whether each slot scales that term by its own state, so that it depends on "
        "the context too; default: yes, no for the paper's head.",
    )
    draft_vocab: int | None = Field(
        None, ge=0, description="Score only so many tokens, the answers' most frequent; 0: all."
    )
    hooks: IntList | None = Field(
        None,
        description="Hooked states in vLLM's numbering, as in 0,3,5,6; default: the paper's, or "
        "the nearest that vLLM's class for the target hands out.",
    )
    slot_mask: Literal["slots", "mixed"] | None = Field(
        None, description="What slots see: each other, or the context too."
    )
    context_window: int | None = Field(
        None,
        ge=0,
        description="Let the head see only so many tokens up to where it drafts; default: all.",
    )
    context_sinks: int | None = Field(
        None, ge=0, description="With --context-window: the text's first tokens that it sees, too."
    )
    bonus_embedding: bool | None = Field(None, description="Whether slots see the bonus token.")
    nested_slots: bool | None = Field(
        None, description="Train with varying numbers of slots, so that any fewer can be served."
    )
    intermediate_size: int | None = Field(
        None, gt=0, description="Width of the slots' feed-forward layer; default: the target's."
    )

    epochs: int = Field(3, ge=1, description="Times through the data.")
    max_steps: int | None = Field(None, ge=1, description="Steps; takes the place of --epochs.")
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Hours on the clock, evaluations included, over all continuations; the "
        "learning rate falls with them. --epochs or --max-steps may end it earlier.",
    )
    batch_tokens: int = Field(
        4096, ge=1, description="Tokens in one batch of one process, several texts to a row."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Texts in a batch, one to a row; takes the place of --batch-tokens."
    )
    max_length: int = Field(2048, ge=4, description="Longer texts are cut.")
    accumulate: int = Field(1, ge=1, description="Batches per process and step.")
    anchors_per_text: Annotated[
        Literal["all"] | Annotated[int, Field(ge=1)] | None,
        Spelling("N|all", "a whole number above 0, or 'all'"),
    ] = Field(
        None,
        description="Positions drawn from a text at which the head drafts; or 'all'; default: 32 "
        "on a GPU, 128 on a CPU.",
    )

    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="Muon for matrices with AdamW for the rest, or AdamW (the paper)."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Highest rate; default: 0.01 for muon, 5e-4 for adamw."
    )
    vector_learning_rate: float | None = Field(
        None, gt=0, description="With muon, of vectors and tables; default: a fifth of the other."
    )
    weight_decay: float = Field(0.01, ge=0, description="Of matrices.")
    scheduler: Literal["trapezoid", "cosine", "linear", "constant"] | None = Field(
        None, description="Shape of the rate over time; default: trapezoid, cosine for adamw."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")

    slot_weights: str = Field(
        "decay",
        description="'decay' (0.85**i), 'uniform', 'reach' (less, text by text, behind tokens that "
        "the head is not sure of), or one number per slot, as in 1,1,0.5.",
    )
    slot_counts: IntList | None = Field(
        None, description="Numbers of slots drawn from in each step; default for 8: 2,4,4,8."
    )
    kl_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the loss that is the divergence from the target's distribution; "
        "default: 0.5, 0 for the paper's head and beside --tv-weight or --lk-weight.",
    )
    tv_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the loss that is the total variation distance from the target's "
        "distribution, the chance that a sampled draft is rejected. What the three shares leave is "
        "cross entropy.",
    )
    lk_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the loss that is the hybrid of both (arXiv 2602.23881): mostly "
        "divergence where a draft is far off, mostly total variation where it is close.",
    )
    sample_vocab: int | None = Field(
        None,
        ge=0,
        description="Score about so many tokens in a step: those likely there, and an even sample "
        "that stands for the others; 0: all. Default: all on a GPU, 4096 on a CPU.",
    )

    eval_share: float = Field(0.05, ge=0, lt=1, description="Share of the texts held out.")
    eval_texts: int | None = Field(
        None,
        ge=1,
        description="Most held-out texts evaluated; default: 64, fewer where evaluating would "
        "take more than a tenth of the run.",
    )
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations; default: 10 in a run."
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; default: at each evaluation."
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of the log.")

    seed: int = Field(
        0,
        ge=0,
        description="Decides all random draws. Which texts are held out does not depend on it.",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Arithmetic; auto: bfloat16 on a GPU and on a CPU with instructions for it, "
        "else float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    memory: int | None = Field(
        None, ge=1, description="MiB for logits and slots; default: 2048 on a GPU, 256 on a CPU."
    )

    cache_states: float = Field(
        0.0,
        ge=0,
        description="GiB of disk, beside --out, for the target's states of each process, so that "
        "it runs once per text instead of once per epoch; never more than a quarter of what is "
        "free. A run that is continued then equals an undisturbed one up to rounding only.",
    )

    states: Annotated[str, Spelling("{transformers,vllm,URL}")] = Field(
        "transformers",
        description="What runs the target: 'transformers' in this process; 'vllm', an engine "
        "beside it, for targets of any size and quantisation that vLLM serves; or the URL of a "
        "`vllm serve` that writes hidden states where this process can read them. With the latter "
        "two this process loads only the target's embedding, final norm and lm_head.",
    )
    states_disk: float = Field(
        8.0,
        gt=0,
        description="GiB of disk, beside --out or where the server writes, for vLLM's states that "
        "wait to be trained on; never more than a quarter of what is free.",
    )
    served_model: str | None = Field(
        None, description="Name the server of --states knows the target by; default: --target."
    )
    engine_args: JsonObject = Field(
        {},
        description="More arguments for vLLM's engine, such as '{\"tensor_parallel_size\": 2}'.",
    )
    engine_devices: str | None = Field(
        None,
        description="GPUs of vLLM's engine, as in 1,2; default: this process's, of whose memory it "
        "takes 60%.",
    )

    @field_validator("states")
    @classmethod
    def _known_states(cls, states: str) -> str:
        if states not in ("transformers", "vllm") and not is_url(states):
            raise ValueError(
                f"expected 'transformers', 'vllm' or the URL of a server such as "
                f"http://127.0.0.1:8000, found {states!r}"
            )
        return states

    @model_validator(mode="after")
    def _has_effect(self) -> TrainSettings:
        """Refuse settings that would have no effect."""
        names = ("states_disk", "engine_args", "engine_devices")
        given = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
        if self.states == "transformers" and given:
            raise ValueError(
                f"{self.written(min(given))}: it is about vLLM's engine; add --states vllm, or "
                "leave it out"
            )
        if self.source == "server" and (of_engine := {"engine_args", "engine_devices"} & {*given}):
            raise ValueError(
                f"{self.written(min(of_engine))}: the server of --states is running already; leave "
                "it out, and start the server with it"
            )
        if self.source != "server" and self.served_model is not None:
            raise ValueError(
                f"--served-model {self.served_model}: it is about a server; give its URL to "
                "--states, or leave it out"
            )
        if self.states != "transformers" and self.cache_states:
            raise ValueError(
                f"--cache-states {self.cache_states}: with --states {self.states} every epoch's "
                "states are made anew; leave it out, --states-disk bounds what waits to be "
                "trained on"
            )
        refuse_own(self.engine_args, OWN, "the training")
        if self.engine_args.get("pipeline_parallel_size", 1) != 1:
            raise ValueError(
                "--engine-args: 'pipeline_parallel_size': the states of earlier stages are not "
                "kept from being overwritten; use 'tensor_parallel_size'"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.finish is None:
            for name in ("target", "data", "out"):
                if not getattr(self, name):
                    raise ValueError(f"{self.written(name)}: needed")
        self.weights()
        if (self.kl_weight or 0.0) + self.tv_weight + self.lk_weight > 1:
            raise ValueError(
                f"--kl-weight {self.kl_weight}, --tv-weight {self.tv_weight}, --lk-weight "
                f"{self.lk_weight}: they are shares of one loss, together at most 1"
            )
        if self.slot_counts is not None:
            _within("--slot-counts", self.slot_counts, self.slots)
        return self

    @property
    def source(self) -> Literal["transformers", "vllm", "server"]:
        """Who runs the target, whatever the server's address is."""
        if is_url(self.states):
            return "server"
        return "vllm" if self.states == "vllm" else "transformers"

    def weights(self) -> tuple[float, ...]:
        """One weight per slot.

        Raises:
            ValueError: the list has another length or holds what is no weight.
        """
        if self.slot_weights == "decay":
            return tuple(SLOT_DECAY**slot for slot in range(self.slots))
        if self.slot_weights in ("uniform", REACH):
            return (1.0,) * self.slots
        try:
            weights = tuple(float(part) for part in self.slot_weights.split(","))
        except ValueError:
            weights = ()
        usable = all(math.isfinite(w) and w >= 0 for w in weights) and any(weights[:1])
        if len(weights) != self.slots or not usable:
            raise ValueError(
                f"--slot-weights {self.slot_weights}: expected 'decay', 'uniform', 'reach' or "
                f"{self.slots} numbers (one per slot) from 0 on, the first above 0"
            )
        return weights

    def counts(self, nested: bool) -> tuple[int, ...]:
        """Numbers of slots that a step may run."""
        if not nested:
            return (self.slots,)
        half, quarter = max(1, self.slots // 2), max(1, self.slots // 4)
        return self.slot_counts or (quarter, half, half, self.slots)

    def anchors(self, device: str) -> int | None:
        """Anchors drawn from a text on this kind of device; None: all."""
        if self.anchors_per_text == "all":
            return None
        return self.anchors_per_text or (CPU_ANCHORS if device == "cpu" else GPU_ANCHORS)

    def sample(self, device: str) -> int:
        """Tokens that a step scores on this kind of device, about; 0: all."""
        if self.sample_vocab is not None:
            return self.sample_vocab
        return CPU_SAMPLE if device == "cpu" else GPU_SAMPLE

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or LEARNING_RATES[self.optimizer]

    @property
    def vector_rate(self) -> float:
        """The highest learning rate of vectors and tables."""
        if self.optimizer == "adamw":
            return self.rate
        return self.vector_learning_rate or self.rate * VECTOR_SHARE

    @property
    def shape(self) -> str:
        """The scheduler in force."""
        return self.scheduler or ("trapezoid" if self.optimizer == "muon" else "cosine")

    def with_slots(self, slots: int) -> TrainSettings:
        """The same with so many slots, unless their number was given.

        Raises:
            SettingsError: another option does not suit them.
        """
        if "slots" in self.model_fields_set:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return self.read(**given | {"slots": slots})

    def shape_options(self) -> dict[str, Any]:
        """Options that were given about the head's shape: field of its configuration -> value."""
        given = {SHAPE_FIELDS[name] for name in self.model_fields_set if name in SHAPE_FIELDS}
        return {name: value for name, value in self.head_fields().items() if name in given}

    @property
    def mix(self) -> Mix:
        """The losses of a slot."""
        divergence = self.kl_weight
        if divergence is None:
            others = self.tv_weight or self.lk_weight
            divergence = KL_WEIGHT if self.preset == "default" and not others else 0.0
        return Mix(divergence, self.tv_weight, self.lk_weight)

    def head_fields(self) -> dict[str, Any]:
        """Fields of the head's configuration that differ from the preset's."""
        rank = self.markov_rank
        if rank is None and self.preset == "default":
            rank = MARKOV_RANK
        fields = {field: getattr(self, name) for name, field in SHAPE_FIELDS.items()}
        fields["markov_rank"] = rank
        if self.markov_gate is None and self.preset == "default":
            fields["markov_gate"] = bool(rank)
        return {name: value for name, value in fields.items() if value is not None}


def _within(name: str, counts: tuple[int, ...], slots: int) -> None:
    if not counts or min(counts) < 1 or max(counts) > slots:
        raise ValueError(
            f"{name} {','.join(map(str, counts))}: expected numbers from 1 to {slots} (--slots)"
        )
