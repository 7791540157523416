"""States are kept from being overwritten where they are extracted for training, only there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vllm_specformer.engine.patches.extraction import load_on_v1, load_on_v2
from vllm_specformer.serving.hidden_states import engine_arguments


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)  # as norms on a GPU do


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])


def drafter(connector: str | None) -> Any:
    extracted = SimpleNamespace(eagle_aux_hidden_state_layer_ids=[0, 2])
    transfer = None if connector is None else SimpleNamespace(kv_connector=connector)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=extracted)),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 3),
    )
    return SimpleNamespace(vllm_config=config)


@pytest.mark.parametrize("load", [load_on_v1, load_on_v2])
@pytest.mark.parametrize("connector", ["ours", "ExampleHiddenStatesConnector", None])
def test_handed_out_states_stay(load: Any, connector: str | None) -> None:
    kept = connector == "ours"
    if kept:
        arguments = engine_arguments(Path("target"), [0], "float32", 8, Path("states"))
        connector = arguments["kv_transfer_config"]["kv_connector"]
    decoder, loaded = Decoder(), []
    target = SimpleNamespace(model=decoder)
    load(lambda self, target: loaded.append(target), drafter(connector), target)
    assert loaded == [target]
    state = torch.zeros(2, 4)
    decoder.layers[0](state)
    assert bool((state == 0).all()) is kept
