"""Everything of PEDRO's that rides on vLLM's objects between its processes, in one place.

| crossing | rides on | is put by | is taken by |
| --- | --- | --- | --- |
| `RequestSpec` | an open dictionary of its parameters | input processor | scheduler, runner |
| assignments | an attribute of `SchedulerOutput` | scheduler | runner, scheduler |
| prefetches | another one | scheduler | runner |
| `StepReport` | an attribute of `ModelRunnerOutput` | runner | scheduler |
| failed requests | `IntermediateTensors` | a pipeline stage | the next one |
| counts | `SchedulerStats.ec_connector_stats` | scheduler | metrics |
| a failure's reason | `stop_reason` of a request's last output | scheduler | front end |
| calls | `EngineCore`, `WorkerBase`: methods of these names | front end | engine core, worker |

What is due and is not there is an error: an attribute that was lost on the way would otherwise read
as "nobody enters" or "nothing failed".
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..serving.adapters import AdapterBank
from ..serving.rows import Assignment
from ..serving.spec import RequestSpec

KEY = "vllm_pedro"
"""PEDRO's key in vLLM's open dictionaries: `extra_args`, `extra_kwargs`, `ec_connector_stats`."""

_ASSIGNMENTS = "pedro_assignments"
_PREFETCHES = "pedro_prefetches"
_REPORT = "pedro_report"
_FAILED = "pedro_failed"
_FAILURE = "PEDRO: "


class WireError(RuntimeError):
    """Something that has to travel with one of vLLM's objects was lost on the way."""


# Front end -> scheduler and worker: both kinds of parameters have a channel for a plugin's data of
# a request. It reaches all processes, and both runners hand it on with a new request.


def params_of(request: Any) -> Any:
    """A request's sampling parameters or, in a pooling engine, its pooling parameters."""
    return request.pooling_params if request.sampling_params is None else request.sampling_params


def channel_of(params: Any) -> str:
    """The attribute of a request's parameters that is open to plugins."""
    return "extra_args" if hasattr(params, "extra_args") else "extra_kwargs"


def carries_spec(params: Any) -> bool:
    """Whether something lies where a request's spec belongs; users may not put it there."""
    return (getattr(params, channel_of(params), None) or {}).get(KEY) is not None


def put_spec(params: Any, spec: RequestSpec) -> None:
    """Have a request's spec travel with its parameters."""
    channel = channel_of(params)
    setattr(params, channel, {**(getattr(params, channel) or {}), KEY: spec.to_wire()})


def spec_of(params: Any) -> RequestSpec | None:
    """The spec that travels with parameters; None for a request without an adapter."""
    extra = getattr(params, channel_of(params), None)
    wire = extra.get(KEY) if extra else None
    return None if wire is None else RequestSpec.from_wire(wire)


def spec_of_request(request: Any) -> RequestSpec | None:
    """`spec_of` of one of the scheduler's requests; unpacked once, as its blocks are hashed one by
    one.
    """
    if not hasattr(request, "pedro"):
        request.pedro = spec_of(params_of(request))
    spec: RequestSpec | None = request.pedro
    return spec


# Scheduler -> worker.


def put_assignments(scheduler_output: Any, assignments: dict[str, Assignment]) -> None:
    """Send the rows of the requests that enter the batch in this step, of none too."""
    setattr(scheduler_output, _ASSIGNMENTS, assignments)


def assignments_of(scheduler_output: Any) -> dict[str, Assignment]:
    """Request id -> row of the vector store, for the requests that enter in this step.

    Raises:
        WireError: They were not put, or were lost.
    """
    found: dict[str, Assignment] | None = getattr(scheduler_output, _ASSIGNMENTS, None)
    if found is None:
        raise WireError(
            "a step came without PEDRO's assignments: vLLM's SchedulerOutput lost them, or the "
            "engine runs another scheduler than vllm_pedro's"
        )
    return found


def put_prefetches(scheduler_output: Any, specs: list[RequestSpec]) -> None:
    """Send requests for adapters that later steps need, or none."""
    setattr(scheduler_output, _PREFETCHES, specs)


def prefetches_of(scheduler_output: Any) -> list[RequestSpec]:
    """Requests for adapters that later steps need; none where no scheduler made the step."""
    return getattr(scheduler_output, _PREFETCHES, [])


# Worker -> scheduler.


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the scheduler has to know of a step.

    Attributes:
        failed: Request id -> why its adapter could not be loaded.
        stats: Counts as `PedroRuntime.take_stats` gives them.
        loaded, lost: Adapters by digest, as `PedroRuntime.take_loaded` gives them.
    """

    failed: dict[str, str] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, bool] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def put_report(output: Any, report: StepReport) -> None:
    """Send a step's report with its output; an asynchronous one wraps what the scheduler sees."""
    for name in ("_model_runner_output", "model_runner_output"):  # V1's, V2's
        output = getattr(output, name, output)
    setattr(output, _REPORT, report)


def with_report(output: Any, report: StepReport) -> Any:
    """A copy of the output of a step without tokens, which vLLM shares among them, and a report."""
    output = copy.copy(output)
    put_report(output, report)
    return output


def report_of(model_runner_output: Any) -> StepReport:
    """The report of a step.

    Raises:
        WireError: It was not put, or was lost.
    """
    report = getattr(model_runner_output, _REPORT, None)
    if not isinstance(report, StepReport):
        raise WireError(
            "a step's output came without PEDRO's report: vLLM's ModelRunnerOutput lost it, or the "
            "worker runs another model runner than vllm_pedro's"
        )
    return report


# One stage of pipeline parallelism -> the next. vLLM hears the last one alone.


def hand_on_failures(intermediate_tensors: Any, request_ids: Iterable[str]) -> None:
    """Send requests that failed in a step with what the next stage computes on.

    As a tensor, as vLLM's CPU backend sends nothing else.
    """
    text = bytearray(json.dumps(list(request_ids)).encode())
    intermediate_tensors.tensors[_FAILED] = torch.frombuffer(text, dtype=torch.uint8)


def take_failures(intermediate_tensors: Any) -> list[str]:
    """The requests that failed in earlier stages; they are gone from there afterwards.

    Only where there are any are the tensors waited for.
    """
    if _FAILED not in vars(intermediate_tensors)["tensors"]:
        return []
    text = intermediate_tensors.tensors.pop(_FAILED)
    return [str(request_id) for request_id in json.loads(bytes(text.tolist()))]


# Scheduler -> front end.


def put_stats(scheduler_stats: Any, stats: dict[str, Any]) -> None:
    """Send counts with the scheduler's statistics.

    In the one field that may hold any values. It is for connectors of multimodal encoders, which
    are refused.
    """
    payload = dict(scheduler_stats.ec_connector_stats or {})
    scheduler_stats.ec_connector_stats = {**payload, KEY: stats}


def take_stats(scheduler_stats: Any) -> dict[str, Any] | None:
    """The counts that came with statistics, if any; they are gone from there afterwards."""
    payload = scheduler_stats.ec_connector_stats
    if not payload or KEY not in payload:
        return None
    stats: dict[str, Any] = payload.pop(KEY)
    scheduler_stats.ec_connector_stats = payload or None
    return stats


def put_failure(output: Any, reason: str, is_pooling: bool = False) -> None:
    """Have a request's last output say that its adapter could not be loaded, and why."""
    output.stop_reason = _FAILURE + reason
    if is_pooling:
        # Without one, vLLM's front end takes the output for that of a request that generates.
        output.pooling_output = torch.empty(0)


def failure_of(output: Any) -> str:
    """Why a request ended for want of its adapter; the empty string if it did not.

    Args:
        output: vLLM's `RequestOutput` or `PoolingRequestOutput`.
    """
    error = getattr(output, "error", None)
    if error is not None:
        return str(error.message) if error.code == KEY else ""
    completions = output.outputs if isinstance(output.outputs, list) else ()
    return next(filter(None, map(_failure_of_completion, completions)), "")


def _failure_of_completion(completion: Any) -> str:
    if completion.finish_reason != "error":
        return ""
    return _reason(completion.stop_reason)


def _reason(stop_reason: Any) -> str:
    text = str(stop_reason)
    return text.removeprefix(_FAILURE) if text.startswith(_FAILURE) else ""


def make_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `RequestState`: a pooling request whose adapter failed has vLLM's kind of error."""

    def wrapped(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        reason = "" if pooling_output is None else _reason(stop_reason)
        if reason:
            from vllm.outputs import RequestError

            kwargs["error"] = RequestError(KEY, reason)
        return original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs
        )

    return wrapped


# Front end -> engine core and workers: vLLM calls methods by name. `plugin.py` adds them.


async def retire(engine_client: Any, digest: str) -> dict[int, dict[str, Any]]:
    """Free an adapter's memory in the workers once no request needs it; counts by engine.

    The counts tell an idle engine's metrics that the memory is free; in each engine that worker
    counts whose reports the scheduler hears.
    """
    core, parallel = engine_client.engine_core, engine_client.vllm_config.parallel_config
    reporting = (parallel.pipeline_parallel_size - 1) * parallel.tensor_parallel_size
    answers = await core.call_utility_all_async(
        "collective_rpc", "pedro_retire", None, (digest,), None
    )
    return {
        engine: dict(counts[reporting])
        for engine, counts in zip(core.engine_ranks_managed, answers, strict=True)
    }


async def restore(engine_client: Any, digest: str) -> None:
    """Serve an adapter that may have been retired."""
    await engine_client.collective_rpc("pedro_restore", args=(digest,))


async def replace(
    engine_client: Any,
    name: str,
    path: str,
    digest: str,
    pools: str,
    nbytes: int,
    scope: str,
) -> int:
    """Give a name's new content to the requests that have not begun; how many those are."""
    counts = await engine_client.engine_core.call_utility_all_async(
        "pedro_replace", name, path, digest, pools, nbytes, scope
    )
    return sum(map(int, counts))


def preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `EngineCore`: take a PEDRO request out of `lora_request`.

    Else it counts towards `max_loras`, the LoRA manager tries to load it, and its name and path
    enter the block hashes. From here on a request's adapter is its spec alone.

    In a server this runs beside the steps, in the thread that takes requests in: where the worker
    is in this process, the adapter is read before the request reaches the scheduler.
    """

    def wrapped(self: Any, request: Any) -> Any:
        spec = spec_of(params_of(request))
        if spec is not None:
            request.lora_request = None
            bank = bank_here(self)
            if bank is not None:
                bank.hint(spec)
        return original(self, request)

    return wrapped


def bank_here(core: Any) -> AdapterBank | None:
    """The adapters of an engine core's worker, if that is the only one and in this process."""
    worker = getattr(getattr(core.model_executor, "driver_worker", None), "worker", None)
    if worker is None or core.vllm_config.parallel_config.world_size > 1:
        return None
    bank: AdapterBank = worker.model_runner.pedro.bank
    core.scheduler.pedro_bank = bank
    return bank


def add_core_methods(engine_core: type) -> None:
    """Add what `replace` calls; vLLM counts the arguments, so they have to be named."""

    def pedro_replace(
        self: Any,
        name: str,
        path: str,
        digest: str,
        pools: str,
        nbytes: int,
        scope: str,
    ) -> int:
        """Called by a front end: see `PedroSchedulerMixin.pedro_replace`."""
        return int(self.scheduler.pedro_replace(name, path, digest, pools, nbytes, scope))

    engine_core.pedro_replace = pedro_replace  # type: ignore[attr-defined]


def add_worker_methods(worker: type) -> None:
    """Add what `retire` and `restore` call."""

    def pedro_retire(self: Any, digest: str) -> dict[str, Any]:
        """Free an adapter's memory once no request needs it; the counts."""
        self.model_runner.pedro.retire(digest)
        return dict(self.model_runner.pedro.take_stats())

    def pedro_restore(self: Any, digest: str) -> None:
        """An adapter that may have been retired is served again."""
        self.model_runner.pedro.restore(digest)

    worker.pedro_retire = pedro_retire  # type: ignore[attr-defined]
    worker.pedro_restore = pedro_restore  # type: ignore[attr-defined]
