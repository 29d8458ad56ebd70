"""Counts on their way to Prometheus."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_pedro.integration import wire
from vllm_pedro.integration.frontend.metrics import PedroMetrics


@pytest.fixture
def metrics():
    unregister_vllm_metrics()
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="base"))
    yield PedroMetrics(config, [0], 4096)
    unregister_vllm_metrics()


def value(name, **labels):
    labels = {"model_name": "base", "engine": "0", **labels}
    return REGISTRY.get_sample_value(f"vllm:pedro_{name}", labels)


STATS = {
    "hits": {"device": 2},
    "loads": {"host": 1, "device": 1},
    "evictions": {"host": 3},
    "removals": {"device": 1},
    "prefills": {"disk": 1, "cached": 4},
    "seconds": {"host": [0.002, 0.2]},
    "resident": {"device": 5, "host": 6},
    "used_bytes": 1024,
}


def test_what_a_step_counted_is_published_and_hidden_from_other_loggers(metrics):
    stats = SchedulerStats()
    wire.put_stats(stats, STATS)
    metrics.record(stats, None)
    assert stats.ec_connector_stats is None
    metrics.record(SchedulerStats(), None)
    metrics.record(None, None)
    assert value("adapters_resident", tier="device") == 5
    assert value("adapters_resident", tier="host") == 6
    assert value("adapter_memory_bytes") == 4096
    assert value("adapter_memory_used_bytes") == 1024
    assert value("adapter_hits_total", tier="device") == 2
    assert value("adapter_loads_total", tier="host") == 1
    assert value("adapter_evictions_total", tier="host") == 3
    assert value("adapter_removals_total", tier="device") == 1
    assert value("prefills_total", state="cached") == 4
    assert value("adapter_load_seconds_count", tier="host") == 2
    assert value("adapter_load_seconds_bucket", tier="host", le="0.0025") == 1
    metrics.set_registered(7)
    assert value("adapters_registered") == 7


def test_everything_is_there_from_the_start_and_no_label_is_an_adapters_name(metrics):
    assert value("prefills_total", state="failed") == 0
    assert value("adapter_loads_total", tier="host") == 0
    names = {
        label
        for family in REGISTRY.collect()
        if family.name.startswith("vllm:pedro")
        for sample in family.samples
        for label in sample.labels
    }
    assert names == {"model_name", "engine", "tier", "state", "le"}


def test_pedro_names_stay_out_of_the_label_that_lists_loras(metrics):
    metrics.is_pedro_name = lambda name: name.startswith("pedro")
    stats = SchedulerStats(
        running_lora_adapters={"pedro-1": 1, "lora": 1}, waiting_lora_adapters={"pedro-2": 1}
    )
    metrics.record(stats, None)
    assert stats.running_lora_adapters == {"lora": 1}
    assert stats.waiting_lora_adapters == {}
