"""What operators see: counts on their way from the workers to vLLM's Prometheus registry.

A worker counts (`serving/stats.py`), its step's output takes the counts to the scheduler, the
scheduler's statistics take them to the front end, and a stat logger beside vLLM's own publishes
them there. Labels are `model_name` and `engine`, as vLLM has them, and one of a fixed set;
never the name of an adapter. But for one metric of vLLM's, by which routers choose a server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...serving.stats import PREFILL_STATES, TIERS
from .. import wire
from ..options import options_of

LOAD_SECONDS_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)


class AdapterInfo:
    """`vllm:lora_requests_info`, as the Gateway API inference extension and others read it.

    Its labels name the adapters of requests that run and that wait, and its value is the time.
    vLLM 0.32 puts every name in both labels (vllm-project/vllm#54830), and leaves a series behind
    for each set of names that there ever was. Here a name is where it has requests, and there is
    one series, whose labels name at most `max_num_seqs` adapters each.

    `max_lora` is how many adapters a batch takes: a router that counts as many sends others
    elsewhere. PEDRO's are bounded by `max_num_seqs` alone. With LoRA on, too, it is what LoRA
    takes beside the PEDRO adapters that are named.

    Args:
        vllm_config: vLLM's.
        gauge: vLLM's own, where LoRA is on.
        num_engines: Whose batches are added up: the front end tells names for all of them.
    """

    def __init__(self, vllm_config: Any, gauge: Any = None, num_engines: int = 1) -> None:
        from prometheus_client import Gauge

        self._gauge = gauge or Gauge(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            ["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        lora = vllm_config.lora_config
        self._most = vllm_config.scheduler_config.max_num_seqs * num_engines
        self._max_loras = None if lora is None else lora.max_loras * num_engines
        self._shown: tuple[str, ...] = ()
        self.show({}, {}, 0)  # routers hold a server without it for full

    def show(self, running: Mapping[str, int], waiting: Mapping[str, int], num_pedro: int) -> None:
        """Say what runs and waits.

        Args:
            running, waiting: Name -> requests, which may be none.
            num_pedro: How many of the names are PEDRO adapters.
        """
        most = self._most if self._max_loras is None else self._max_loras + num_pedro
        labels = (str(most), self._names(waiting), self._names(running))
        self._gauge.labels(*labels).set_to_current_time()
        if self._shown not in ((), labels):
            self._gauge.remove(*self._shown)
        self._shown = labels

    def _names(self, requests: Mapping[str, int]) -> str:
        # A comma in a name would make two others of it.
        names = [name for name, count in requests.items() if count and "," not in name]
        return ",".join(names[: self._most])


class PedroOutputProcessorMixin:
    """What vLLM's `OutputProcessor` does differently in a server with PEDRO.

    It hears that a request waits with the request's first output, when it waits no longer.
    """

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        states: dict[str, Any] = self.request_states  # type: ignore[attr-defined]
        is_new = request.request_id not in states
        super().add_request(request, *args, **kwargs)  # type: ignore[misc]
        if is_new:
            name = states[request.request_id].lora_name
            self.lora_states.request_waiting(request.request_id, name)  # type: ignore[attr-defined]


class PedroMetrics:
    """A stat logger of vLLM's front end; comes before its other ones.

    Args:
        vllm_config: vLLM's.
        engine_indexes: The engines' numbers.
        memory: Bytes that each device has for adapters.
        info: Where adapters with requests are named; None: those of PEDRO's are not.
    """

    def __init__(
        self,
        vllm_config: Any,
        engine_indexes: list[int],
        memory: int,
        info: AdapterInfo | None = None,
    ) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.is_pedro_name: Callable[[str], bool] = lambda name: False
        self._info = info
        self._labels = {
            i: (vllm_config.model_config.served_model_name, str(i)) for i in engine_indexes
        }
        names = ["model_name", "engine"]
        self._resident = Gauge(
            "vllm:pedro_adapters_resident",
            "PEDRO adapters on the device and in host memory.",
            [*names, "tier"],
            multiprocess_mode="mostrecent",
        )
        self._memory = Gauge(
            "vllm:pedro_adapter_memory_bytes",
            "Bytes that the device has for PEDRO adapters.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._used = Gauge(
            "vllm:pedro_adapter_memory_used_bytes",
            "Bytes that PEDRO adapters take of those.",
            names,
            multiprocess_mode="mostrecent",
        )
        self._registered = Gauge(
            "vllm:pedro_adapters_registered",
            "PEDRO adapters that are served under a model name.",
            names,
            multiprocess_mode="mostrecent",
        )
        # A counter's name ends in _total when it is shown.
        self._counters = {
            "hits": Counter(
                "vllm:pedro_adapter_hits",
                "Adapters that a prompt needed and that the tier held.",
                [*names, "tier"],
            ),
            "loads": Counter(
                "vllm:pedro_adapter_loads",
                "Adapters loaded: into host memory from disk, onto the device from host memory.",
                [*names, "tier"],
            ),
            "evictions": Counter(
                "vllm:pedro_adapter_evictions",
                "Adapters that made room for others, least recently used first.",
                [*names, "tier"],
            ),
            "removals": Counter(
                "vllm:pedro_adapter_removals",
                "Adapters dropped because they were unloaded or replaced.",
                [*names, "tier"],
            ),
            "prefills": Counter(
                "vllm:pedro_prefills",
                "Prompts with a PEDRO adapter by where the adapter was found.",
                [*names, "state"],
            ),
        }
        self._seconds = Histogram(
            "vllm:pedro_adapter_load_seconds",
            "Seconds that loads took.",
            [*names, "tier"],
            buckets=LOAD_SECONDS_BUCKETS,
        )
        for labels in self._labels.values():  # shown as zero from the start
            self._registered.labels(*labels)
            self._memory.labels(*labels).set(memory)
            self._used.labels(*labels)
            for tier in TIERS:
                self._resident.labels(*labels, tier)
                self._seconds.labels(*labels, tier)
            for name, counter in self._counters.items():
                for value in PREFILL_STATES if name == "prefills" else TIERS:
                    counter.labels(*labels, value)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Publish a step's counts, and take them away before the other loggers see them."""
        if scheduler_stats is None:
            return
        counts = wire.take_stats(scheduler_stats)
        if counts:
            self.observe(counts, engine_idx)
        running = scheduler_stats.running_lora_adapters
        waiting = scheduler_stats.waiting_lora_adapters
        pedro = [name for name in {**running, **waiting} if self.is_pedro_name(name)]
        if self._info is not None:
            self._info.show(running, waiting, len(pedro))
            return
        for name in pedro:
            running.pop(name, None)
            waiting.pop(name, None)

    def observe(self, stats: dict[str, Any], engine_idx: int = 0) -> None:
        """Publish counts as `PedroRuntime.take_stats` gives them."""
        labels = self._labels[engine_idx]
        for tier, count in stats.get("resident", {}).items():
            self._resident.labels(*labels, tier).set(count)
        if "used_bytes" in stats:
            self._used.labels(*labels).set(stats["used_bytes"])
        for name, counter in self._counters.items():
            for value, count in stats.get(name, {}).items():
                counter.labels(*labels, value).inc(count)
        for tier, seconds in stats.get("seconds", {}).items():
            histogram = self._seconds.labels(*labels, tier)
            for value in seconds:
                histogram.observe(value)

    def set_registered(self, count: int) -> None:
        """How many model names are PEDRO adapters."""
        for labels in self._labels.values():
            self._registered.labels(*labels).set(count)

    # The rest of what vLLM asks of a stat logger.

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None: ...

    def record_admission_rejection(self, reason: str) -> None: ...


def metrics_of(engine_client: Any) -> PedroMetrics | None:
    """The metrics of a front end, or None where statistics are off."""
    manager = getattr(engine_client, "logger_manager", None)
    loggers = manager.stat_loggers if manager is not None else []
    return next((entry for entry in loggers if isinstance(entry, PedroMetrics)), None)


def init(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `StatLoggerManager`: give a switched-on engine's front end the metrics."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        options = options_of(vllm_config)
        if options is not None:
            memory = options.pedro_memory_bytes
            assert memory is not None
            info = _take_info(vllm_config, self.stat_loggers, len(self.engine_indexes))
            metrics = PedroMetrics(vllm_config, self.engine_indexes, memory, info)
            # The first, since it takes the counts out of a field that others read.
            self.stat_loggers.insert(0, metrics)

    return __init__


def _take_info(vllm_config: Any, stat_loggers: list[Any], num_engines: int) -> AdapterInfo | None:
    """The metric that names adapters, from here on PEDRO's to write.

    None with several API servers: each knows its own requests only, and a series stays for ever in
    the files that they share.
    """
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        return None
    gauge = None
    for entry in stat_loggers:
        if getattr(entry, "gauge_lora_info", None) is not None:
            gauge, entry.gauge_lora_info = entry.gauge_lora_info, None
    return AdapterInfo(vllm_config, gauge, num_engines)
