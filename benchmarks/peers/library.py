"""Heads by the `speculators` library: its classes, losses, optimizers and defaults.

Its own Trainer puts tensors on a GPU, so the loop around them is ours (train_peer.py). What is set
here is what a target of six layers and answers of 160 tokens ask for; all else is the library's
default. Its MTP head only goes on training layers that a target brings along; this one has none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speculators.model import SpeculatorModel
from speculators.train.cli import create_transformer_layer_config
from speculators.train.config import TrainConfig
from speculators.train.optimizers import build_optimizers
from torch import Tensor, nn

from peers.plan import TARGET

BLOCKS = ("dflash", "dspark")  # kinds that draft a block behind an anchor
# Early, middle, late, as the library's own choice would be in a deeper target.
LAYERS = [1, 3, 5]
# The library's default, 5, is for targets of some 36 layers; this one has 6.
BLOCK_LAYERS = 2
# Tokens of a block: eight are drafted, DFlash has the bonus token in front of them.
BLOCK_SIZE = {"dflash": 9, "dspark": 8}
MARKOV_RANK = 64  # as ours; the default, 256, is the whole width of this target
ANCHORS = 24  # of a text; the default of 512 is for rows of 8,192 tokens


@dataclass(frozen=True)
class Peer:
    """A head to be trained.

    Attributes:
        options: of the head's forward pass: its loss and the like.
    """

    kind: str
    model: Any
    config: TrainConfig
    options: dict[str, Any]

    @property
    def block(self) -> int:
        """Tokens of a block; 0 for kinds that have none."""
        return BLOCK_SIZE.get(self.kind, 0)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW at the library's rates."""
        found: list[torch.optim.Optimizer] = build_optimizers(self.model, self.config.optimizer)
        return found

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def settings(kind: str, mask_token: int) -> TrainConfig:
    """The library's settings of one kind of head."""
    draft: dict[str, Any] = {
        "target_layer_ids": LAYERS,
        "mask_token_id": mask_token,
        "draft_attn_impl": "sdpa",
    }
    if kind in BLOCKS:
        draft["num_layers"] = BLOCK_LAYERS
    return TrainConfig(
        speculator_type=kind,
        verifier={"verifier_name_or_path": str(TARGET)},
        draft=draft,
        data={"max_anchors": ANCHORS},
        loss={"loss_implementation": "eager"},
        dflash={"block_size": BLOCK_SIZE.get(kind)},
        dspark={"markov_rank": MARKOV_RANK},
    )


def new_peer(kind: str, vocabulary: int, mask_token: int) -> Peer:
    """A head with random weights, as the library makes it."""
    config = settings(kind, mask_token)
    flat = config.flatten() | {"draft_vocab_size": vocabulary}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = create_transformer_layer_config(
            verifier_name_or_path=str(TARGET),
            num_layers=flat["num_layers"],
            draft_arch=flat["draft_arch"],
            hidden_act=flat["draft_hidden_act"],
            sliding_window=flat["sliding_window"],
            full_attention_indices=flat["full_attention_indices"],
        )
        kind_of_model = SpeculatorModel.registry[kind]
        model = kind_of_model.from_training_args(layer, **flat)
    options, _ = kind_of_model.get_trainer_kwargs(**flat)
    return Peer(kind, model, config, options)


def open_peer(place: Path) -> Any:
    """A trained head, with the target's embedding and lm_head in it."""
    kind = SpeculatorModel.registry[kind_of(place)]
    config = kind.config_class.from_pretrained(place)
    config.transformer_layer_config._attn_implementation = "sdpa"
    model = kind.from_pretrained(place, config=config, verifier=str(TARGET)).eval()
    model.load_verifier_weights()
    if any(parameter.isnan().any() for parameter in model.parameters()):
        raise ValueError(f"{place}: weights are missing")
    return model


def kind_of(place: Path) -> str:
    from speculators.config import SpeculatorModelConfig

    return str(SpeculatorModelConfig.from_pretrained(place).speculators_model_type)


def layers_of(states: Tensor, ids: list[int]) -> Tensor:
    """Of states [..., layers, H] those behind some layers, side by side: [..., ids x H]."""
    return states[..., [i - 1 for i in ids], :].flatten(-2)
