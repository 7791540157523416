"""Hidden states that are extracted for training are kept from being overwritten, as in serving.

vLLM's `extract_hidden_states` method takes the states as the target hands them out, and on a GPU
the layers go on to write into state 0, and in some models into others (see `hooked_states`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_specformer.engine.patches.ledger import patch

_V1 = "vllm.v1.spec_decode.extract_hidden_states:ExtractHiddenStatesProposer"
_V2 = "vllm.v1.worker.gpu.spec_decode.extract_hidden_states:ExtractHiddenStatesSpeculator"
_GUARD = "acts only with `specformer train --states vllm`, whose connector it looks for"
_CONNECTOR = "StatesConnector"


@patch(
    f"{_V1}.load_model",
    why="on a GPU layers write into the states that the target has handed out: lets them work on "
    "copies where states are extracted for training (V1 runner)",
    guard=_GUARD,
)
def load_on_v1(original: Callable[..., None], self: Any, target_model: Any) -> None:
    original(self, target_model)
    _keep_states(self.vllm_config, target_model)


@patch(f"{_V2}.load_model", why="the same on the V2 runner", guard=_GUARD)
def load_on_v2(original: Callable[..., None], self: Any, target_model: Any) -> None:
    original(self, target_model)
    _keep_states(self.vllm_config, target_model)


def _keep_states(vllm_config: Any, target: Any) -> None:
    if getattr(vllm_config.kv_transfer_config, "kv_connector", "") != _CONNECTOR:
        return
    from vllm_specformer.engine.patches.hooked_states import keep_hooked_states

    language = target.get_language_model() if hasattr(target, "get_language_model") else target
    config = vllm_config.speculative_config.draft_model_config.hf_config
    keep_hooked_states(
        getattr(language, "model", language),
        config.eagle_aux_hidden_state_layer_ids,
        vllm_config.model_config.get_total_num_hidden_layers(),
    )
