"""A vLLM engine in a process of its own that writes the hidden states of texts to files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specformer.serving.engine_process import EngineProcess

if TYPE_CHECKING:
    from vllm_specformer.serving.engine import Engine

# Arguments of vLLM that decide what the states are, or whether they arrive.
OWN = (
    *("model", "revision", "dtype", "max_model_len", "hf_overrides", "runner", "convert"),
    *("speculative_config", "kv_transfer_config", "enable_prefix_caching"),
)
_CONNECTOR = "vllm_specformer.engine.extraction.connector:StatesConnector"
_EXTRACT = "vllm_specformer.serving.hidden_states:extract"
_POLL_S = 0.001


@dataclass(frozen=True)
class Extracted:
    """One text's states, and what the engine says next behind it.

    Attributes:
        file: safetensors with `hidden_states` [tokens, ids, H] and `token_ids` int64 [tokens].
        token, logprob: the most probable next token and its log probability.
    """

    file: Path
    token: int
    logprob: float


def engine_arguments(
    target: Path, ids: Sequence[int], dtype: str, max_model_len: int, directory: Path
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, for an engine that `extract` works with; as for `StatesEngine`."""
    module, _, connector = _CONNECTOR.partition(":")
    return {
        "model": str(target),
        "dtype": dtype,
        "max_model_len": max_model_len,
        # A prefix in the cache was computed beside other texts.
        "enable_prefix_caching": False,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(ids)}},
        },
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_connector_module_path": module,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "shared_storage_path": str(directory),
                "use_synchronization_lock": False,
            },
        },
    }


class StatesEngine(EngineProcess):
    """vLLM on a target, with its `extract_hidden_states` method.

    Args:
        target: directory of the model.
        ids: the hidden states, in vLLM's numbering, rising.
        dtype: of target and states.
        max_model_len: tokens of the longest text, and one more.
        directory: gets the files, and vLLM's messages in `vllm.log`.
        engine_args: further arguments of vLLM, none of those in `OWN`.
        environment: variables for the process.
    """

    def __init__(
        self,
        target: Path,
        ids: Sequence[int],
        *,
        dtype: str,
        max_model_len: int,
        directory: Path,
        engine_args: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        arguments = engine_arguments(target, ids, dtype, max_model_len, directory)
        super().__init__(arguments | dict(engine_args), directory / "vllm.log", environment)

    def extract(self, texts: Sequence[Sequence[int]]) -> list[Extracted]:
        """Run the target over token ids; one file per text, whole when this returns.

        Raises:
            EngineProcessError: the engine ended, for example because the disk is full.
        """
        found = self.call(_EXTRACT, texts=[list(text) for text in texts])["texts"]
        return [Extracted(Path(file), token, logprob) for file, token, logprob in found]


def extract(engine: Engine, texts: Sequence[list[int]]) -> dict[str, Any]:
    """What `StatesEngine.extract` asks for, in the engine's process."""
    names = [engine.submit(text, 1, logprobs=0) for text in texts]
    found: dict[str, tuple[str, int, float]] = {}
    # Files are written by steps behind the last token.
    while len(found) < len(names) or not all(Path(file).exists() for file, *_ in found.values()):
        outputs = engine.step()
        for output in outputs:
            if output.finished:
                completion = output.outputs[0]
                (token,) = completion.token_ids
                logprob = completion.logprobs[0][token].logprob
                file = output.kv_transfer_params["hidden_states_path"]
                found[output.request_id] = (file, token, logprob)
        if not outputs:
            time.sleep(_POLL_S)
    return {"texts": [found[name] for name in names]}
