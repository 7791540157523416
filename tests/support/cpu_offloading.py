"""vLLM's offloading connector where the KV cache itself lies in main memory.

vLLM's own worker for it copies with CUDA streams and refuses a CPU. Here a copy is a copy; what is
copied when, from which pages to which, is up to vLLM's scheduler and connector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

# The engine's `kv_transfer_config`.
OFFLOADING: dict[str, Any] = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CopyingSpec",
        "spec_module_path": "support.cpu_offloading",
        "cpu_bytes_to_use": 64 << 20,
    },
}


class CopyingSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return CopyingWorker(kv_caches, self.num_chunks)


class CopyingWorker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        self._groups = kv_caches.group_data_refs
        self._cache = [entry.tensor for entry in kv_caches.tensors]  # int8 [blocks, page]
        self._away = [torch.zeros(num_chunks, t.shape[1], dtype=t.dtype) for t in self._cache]
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        return self._copy(job_id, self._cache, src_spec, self._away, dst_spec, src_spec)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, self._away, src_spec, self._cache, dst_spec, dst_spec)

    def _copy(
        self,
        job_id: int,
        sources: list[torch.Tensor],
        source: LoadStoreSpec,
        targets: list[torch.Tensor],
        target: LoadStoreSpec,
        blocks: GPULoadStoreSpec,
    ) -> bool:
        assert isinstance(source, BlockIDsLoadStoreSpec)
        assert isinstance(target, BlockIDsLoadStoreSpec)
        ends = np.cumsum(blocks.group_sizes)
        for refs, end, size in zip(self._groups, ends, blocks.group_sizes, strict=True):
            read, written = (
                torch.from_numpy(s.block_ids[end - size : end]).long() for s in (source, target)
            )
            for index in {ref.tensor_idx for ref in refs}:
                targets[index][written] = sources[index][read]
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way when `submit_store` has returned."""
