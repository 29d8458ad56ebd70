"""Small adapters on disk, and what reads them, without an engine."""

from __future__ import annotations

import torch

from vllm_pedro.adapter import init_adapter, save_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench.adapters import store_columns
from vllm_pedro.config import PedroConfig
from vllm_pedro.serving.adapters import AdapterLimits, AdapterReader
from vllm_pedro.serving.spec import RequestSpec

SHAPE = BackboneShape(2, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
LIMITS = AdapterLimits(SHAPE, 4)
CPU = torch.device("cpu")


def write(folder, seed=0, shape=SHAPE, dtype=None, **config):
    adapter = init_adapter(PedroConfig(**{"r": 4, **config}), shape, seed=seed, scale=0.1)
    digest = save_adapter(folder, adapter.config, adapter.tensors, dtype)
    return RequestSpec(folder.name, str(folder), digest, 5, "prompt")


def reader(limits=LIMITS):
    return AdapterReader(limits, store_columns(limits.shape, limits.modules))
