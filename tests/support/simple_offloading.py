"""SimpleCPUOffloadConnector where there is no GPU: vLLM's scheduler side, copies by torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import simple_cpu_offload_connector
from vllm.v1.simple_kv_offload import worker


class CopyBackend:
    """In place of `DmaCopyBackend`: copies at once."""

    def init(self, gpu_caches: Any, cpu_caches: Any, *others: Any) -> None:
        self._pairs = [(gpu_caches[name], cpu_caches[name]) for name in gpu_caches]

    def launch_copy(
        self, source: Any, target: Any, is_store: bool, event_idx: int, events_list: Any, **_: Any
    ) -> None:
        for device, host in self._pairs:
            into, origin = (host, device) if is_store else (device, host)
            into[target] = origin[source]
        done = SimpleNamespace(query=lambda: True, synchronize=lambda: None)
        events_list.append((event_idx, done))

    def shutdown(self) -> None:
        pass


class CopyWorker(worker.SimpleCPUOffloadWorker):
    """As upstream, without streams."""

    def register_kv_caches(self, kv_caches: Any) -> None:
        streams = mock.Mock()
        streams.priority_range.return_value = (0, 0)
        with (
            mock.patch.object(torch.cuda, "Stream", streams),
            mock.patch.object(worker, "PIN_MEMORY", False),
            mock.patch.object(worker, "DmaCopyBackend", CopyBackend),
        ):
            super().register_kv_caches(kv_caches)

    def wait_for_save(self) -> None:
        metadata: Any = self._connector_metadata
        backend: Any = self._backend
        if metadata is not None and metadata.store_gpu_blocks:
            backend.launch_copy(
                metadata.store_gpu_blocks,
                metadata.store_cpu_blocks,
                is_store=True,
                event_idx=metadata.store_event,
                events_list=self._store_events,
            )


@contextlib.contextmanager
def copies_on_the_cpu() -> Iterator[None]:
    """Engines that start within have such a worker."""
    name = "SimpleCPUOffloadWorker"
    with mock.patch.object(simple_cpu_offload_connector, name, CopyWorker):
        yield


def simple_offloading(nbytes: int = 1 << 26, **more: Any) -> KVTransferConfig:
    """`LLM`'s `kv_transfer_config`."""
    return KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": nbytes, **more},
    )
