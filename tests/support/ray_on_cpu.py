"""Ray's executor on a CPU, for which vLLM 0.32 names no resource that Ray could hand out.

Imported before the engine starts, and by Ray's actors as they unpickle their class.
"""

from __future__ import annotations

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

RESOURCE = "cpu_rank"


class WorkerOnCpu(ray_executor_v2.RayWorkerProc):
    """A worker that has no GPU."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []


type(current_platform).ray_device_key = RESOURCE
ray_executor_v2.RayWorkerProc = WorkerOnCpu
