"""Offloading of KV blocks where there is no GPU: vLLM's connector and manager, copies by torch.

vLLM's own transfers are CUDA's. Which blocks are stored and loaded, under which keys and when, is
decided by its scheduler side, which is the real one here.
"""

from __future__ import annotations

from typing import Any

from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies at once, and reports it with the next step."""

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int) -> None:
        self._device = [entry.tensor for entry in kv_caches.tensors]
        self._host = [t.new_empty(num_chunks, *t.shape[1:]) for t in self._device]
        self._finished: list[TransferResult] = []

    def _copy(self, job_id: int, source: Any, target: Any, into: Any, of: Any) -> bool:
        for destination, origin in zip(into, of, strict=True):
            for to, at in zip(target.block_ids, source.block_ids, strict=True):
                destination[int(to)].copy_(origin[int(at)])
        self._finished.append(TransferResult(job_id, True))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, self._host, self._device)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, src_spec, dst_spec, self._device, self._host)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass


class CopySpec(CPUOffloadingSpec):
    """As upstream, on a CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = CopyWorker(kv_caches, self.num_chunks)
        return self._worker


def offloading(nbytes: int = 1 << 26, **more: Any) -> KVTransferConfig:
    """`LLM`'s `kv_transfer_config`."""
    where = {"spec_name": "CopySpec", "spec_module_path": "offloading", "cpu_bytes_to_use": nbytes}
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config=where | more,
    )
