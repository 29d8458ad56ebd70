"""Counts on their way to Prometheus."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_pedro.integration import wire
from vllm_pedro.integration.frontend.metrics import AdapterInfo, PedroMetrics


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


def test_pedro_names_stay_out_of_vllms_own_label(metrics):
    """With several API servers."""
    metrics.is_pedro_name = lambda name: name.startswith("pedro")
    stats = SchedulerStats(
        running_lora_adapters={"pedro-1": 1, "lora": 1}, waiting_lora_adapters={"pedro-2": 1}
    )
    metrics.record(stats, None)
    assert stats.running_lora_adapters == {"lora": 1}
    assert stats.waiting_lora_adapters == {}


def info(max_loras=None, max_num_seqs=4, num_engines=1):
    lora = None if max_loras is None else SimpleNamespace(max_loras=max_loras)
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs)
    return AdapterInfo(
        SimpleNamespace(lora_config=lora, scheduler_config=scheduler), None, num_engines
    )


def shown():
    """What is to be read: max_lora, and the names of running and of waiting adapters."""
    (family,) = (f for f in REGISTRY.collect() if f.name == "vllm:lora_requests_info")
    (sample,) = family.samples
    assert time.time() - 5 < sample.value <= time.time()
    labels = dict(sample.labels)
    names = [labels.pop(f"{which}_lora_adapters").split(",") for which in ("running", "waiting")]
    return int(labels.pop("max_lora")), *names, *labels


def test_adapters_are_named_where_they_have_requests(metrics):
    """vLLM's counts have every name in both places."""
    metrics._info = info()
    assert shown() == (4, [""], [""])
    stats = SchedulerStats(
        running_lora_adapters={"a": 2, "b": 1, "c": 0},
        waiting_lora_adapters={"a": 0, "b": 3, "c": 1},
    )
    metrics.record(stats, None)
    assert shown() == (4, ["a", "b"], ["b", "c"])
    metrics.record(SchedulerStats(), None)
    assert shown() == (4, [""], [""])


def test_names_are_as_many_as_a_batch_takes_and_series_are_one(metrics):
    metrics._info = info()
    for step in range(20):
        names = {f"{step}-{i}": 1 for i in range(20)}
        metrics.record(SchedulerStats(running_lora_adapters=names), None)
        assert shown()[1] == [f"{step}-{i}" for i in range(4)]


def test_engines_side_by_side_take_as_many_more(metrics):
    metrics._info = info(num_engines=3)
    assert shown()[0] == 12


def test_a_name_with_a_comma_is_left_out(metrics):
    metrics._info = info()
    metrics.record(SchedulerStats(running_lora_adapters={"a,b": 1, "c": 1}), None)
    assert shown() == (4, ["c"], [""])


def test_lora_has_room_as_far_as_its_slots_go(metrics):
    """A router sends another adapter here while fewer are named than `max_lora`."""
    metrics.is_pedro_name = lambda name: name.startswith("pedro")
    metrics._info = info(max_loras=2)
    assert shown()[0] == 2
    names = {f"pedro-{i}": 1 for i in range(3)}
    metrics.record(SchedulerStats(running_lora_adapters={**names, "lora-1": 1}), None)
    most, running, _ = shown()
    assert most - len(running) == 1
    both = {**names, "lora-1": 1, "lora-2": 1}
    metrics._info._most = 8
    metrics.record(SchedulerStats(running_lora_adapters=both), None)
    most, running, _ = shown()
    assert most - len(running) == 0


def test_vllms_labels_are_the_ones_here():
    """Where LoRA is on, vLLM's own gauge is written."""
    import inspect

    source = inspect.getsource(PrometheusStatLogger.__init__)
    labels = [f"self.labelname_{n}" for n in ("max_lora", "waiting_lora_adapters")]
    labels.append("self.labelname_running_lora_adapters")
    assert ",".join(labels) in "".join(source.split())
