"""What extracting hidden states for training relies on (see `symbols`)."""

from __future__ import annotations

from vllm_specformer.engine.compat.symbols import (
    CLASS,
    Reliance,
    call,
    members,
    override,
)

_CONNECTOR_FILE = "engine/extraction/connector.py"
_KEPT = "engine/patches/extraction.py"
_EXAMPLE = "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
_CONNECTOR = f"{_EXAMPLE}:ExampleHiddenStatesConnector"

EXTRACTION: tuple[Reliance, ...] = (
    Reliance(_CONNECTOR, _CONNECTOR_FILE, "writes states to files", CLASS),
    override(
        f"{_CONNECTOR}._submit_async_write",
        _CONNECTOR_FILE,
        "writes a request's states, on any device",
        "pending",
    ),
    override(
        f"{_CONNECTOR}.get_required_kvcache_layout",
        _CONNECTOR_FILE,
        "leaves the CPU's layout as it is",
        "vllm_config",
    ),
    *members(
        _CONNECTOR,
        _CONNECTOR_FILE,
        "where the states are, and who waits for them",
        "_kv_cache _block_size _is_tp_rank_zero _executor _req_copy_events",
    ),
    *members(_CONNECTOR, _CONNECTOR_FILE, "which states they are", "_vllm_config"),
    call(
        f"{_EXAMPLE}:extract_from_kv_cache",
        _CONNECTOR_FILE,
        "reads states",
        "kv_cache slot_mapping num_tokens",
    ),
    *members(
        f"{_EXAMPLE}:PendingSave",
        _CONNECTOR_FILE,
        "one request's states",
        "req_id filename token_ids block_ids",
    ),
    *members("vllm.config.vllm:VllmConfig", _CONNECTOR_FILE, "whether on a CPU", "device_config"),
    *members("vllm.config.device:DeviceConfig", _CONNECTOR_FILE, "the same", "device_type"),
    *members("vllm.config.kv_transfer:KVTransferConfig", _KEPT, "whose states", "kv_connector"),
    call(
        "vllm.config.model:ModelConfig.get_total_num_hidden_layers", _KEPT, "which list of layers"
    ),
)
