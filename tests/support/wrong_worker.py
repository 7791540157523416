"""`engine_worker` with a mistake made in the engine: `MISTAKE` is "norm" or "hooks".

The classes are vLLM's and ours; only what reaches the head is wrong, as it would be if training and
serving did not mean the same hidden states.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vllm_specformer.engine.patches import registration
from vllm_specformer.serving import engine_worker


def norm_the_last_hook() -> None:
    from vllm_specformer.engine.model import SpecFormerDraftModel as Model

    right = Model.combine_hidden_states

    def combine(self: Any, states: Sequence[Tensor]) -> Tensor:
        return right(self, [*states[:-1], self._target["norm"](states[-1].contiguous())])

    Model.combine_hidden_states = combine


def hook_one_layer_early() -> None:
    from vllm_specformer.engine.model import SpecFormerDraftModel as Model

    right, combine = registration.to_vllm_config, Model.combine_hidden_states

    def convert(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
        right(config_dict, pre_trained_config)
        ids = pre_trained_config["eagle_aux_hidden_state_layer_ids"]
        pre_trained_config["eagle_aux_hidden_state_layer_ids"] = sorted(set(early(ids)))

    def spread(self: Any, states: Sequence[Tensor]) -> Tensor:
        """Hooks that now coincide are one state, which the head is given several times."""
        moved = early(self.config.aux_hidden_state_layer_ids)
        unique = sorted(set(moved))
        return combine(self, [states[unique.index(i)] for i in moved])

    registration.to_vllm_config, Model.combine_hidden_states = convert, spread


def early(ids: Sequence[int]) -> list[int]:
    return [max(i - 1, 0) for i in ids]


if __name__ == "__main__":
    {"norm": norm_the_last_hook, "hooks": hook_one_layer_early}[os.environ["MISTAKE"]]()
    engine_worker.main()
