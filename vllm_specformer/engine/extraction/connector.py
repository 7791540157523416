"""vLLM's example connector for hidden states, on any device, and with files that are whole.

vLLM's `extract_hidden_states` method keeps the states of every token in the K/V cache, and its
`ExampleHiddenStatesConnector` writes those of a request to a file when it ends. That copies with
CUDA streams, which a CPU has none of, and loses a failed write in the log. Here a file appears
under its name when it is whole, a failed write ends the engine, and a request's pages are held
until its file is there, so that what waits to be written is bounded.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)

from vllm_specformer.state_files import LAYER_IDS, joined

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PARTIAL = ".partial"


class StatesConnector(ExampleHiddenStatesConnector):
    """Writes `hidden_states` [tokens, ids, H], in the target's dtype, and `token_ids` [tokens].

    The file's metadata says which states they are, as a server does not (see `LAYER_IDS`).
    """

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        # The CPU's attention knows one layout, another one; what is read here takes strides.
        if vllm_config.device_config.device_type == "cpu":
            return None
        layout: str | None = super().get_required_kvcache_layout(vllm_config)
        return layout

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        cache = self._kv_cache
        offsets = torch.arange(self._block_size)
        slots = (torch.tensor(pending.block_ids)[:, None] * self._block_size + offsets).flatten()
        states = extract_from_kv_cache(cache, slots.to(cache.device), len(pending.token_ids))
        tensors = {"hidden_states": states.cpu().contiguous(), "token_ids": pending.token_ids}
        extracted = self._vllm_config.speculative_config.draft_model_config.hf_config
        ids = joined(extracted.eagle_aux_hidden_state_layer_ids)
        # A server is given a directory that nobody has made.
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        written = self._executor.submit(_write, tensors, pending.filename, {LAYER_IDS: ids})
        self._req_copy_events[pending.req_id] = _Written(written)


class _Written:
    """What the base class takes for the event behind a copy: done when the file is there."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def query(self) -> bool:
        """Whether it is.

        Raises:
            OSError: it could not be written.
        """
        if self._future.done():
            self._future.result()
        return self._future.done()


def _write(tensors: dict[str, Tensor], filename: str, about: dict[str, str]) -> None:
    save_file(tensors, filename + PARTIAL, about)
    os.replace(filename + PARTIAL, filename)
