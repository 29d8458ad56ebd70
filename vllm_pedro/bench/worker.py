"""The process of one engine: runs workloads that come down a pipe, and times them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..errors import first_line
from .adapters import LORA_RANK, MODULES, PEDRO_RANK
from .cases import EngineSpec, Job
from .driver import Progress, Timing, drive
from .workloads import Request


def serve(pipe: Connection, spec: EngineSpec, log: str) -> None:
    """Start an engine, then run what comes down the pipe until it is told to close.

    The main function of the process that `EngineProcess` spawns. What vLLM prints goes to the file
    `log`.
    """
    _end_with_parent()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    # Threads are not bound to cores, because several engines share them in turns.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = None
    try:
        engine = BenchEngine(spec)
        pipe.send(("ready", engine.facts))
        while True:
            command, value = pipe.recv()
            if command == "close":
                break
            if command == "peak":
                pipe.send(("peak", engine.peak_bytes()))
            else:
                pipe.send(("timings", engine.run(value, pipe)))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        pipe.send(("failed", f"{type(error).__name__}: {first_line(error)}"))
    finally:
        pipe.close()
        if engine is not None:
            engine.shutdown()


def _end_with_parent() -> None:
    """An engine must not outlive a benchmark that was killed (Linux; elsewhere it ends when its
    run does)."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def keywords_of(spec: EngineSpec) -> dict[str, Any]:
    """`LLM`'s keywords for an engine."""
    keywords: dict[str, Any] = {
        "distributed_executor_backend": "uni",
        "enforce_eager": not spec.compiled,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        **spec.settings,
    }
    host_slots = max(spec.slots, spec.host_slots)
    if spec.kind == "pedro":
        keywords |= {
            "enable_pedro": True,
            "max_pedros": spec.slots,
            "max_cpu_pedros": host_slots,
            "max_pedro_rank": PEDRO_RANK,
            "pedro_target_modules": list(MODULES),
        }
    elif spec.kind == "lora":
        keywords |= {
            "enable_lora": True,
            "max_loras": spec.slots,
            "max_cpu_loras": host_slots,
            "max_lora_rank": LORA_RANK,
        }
    return keywords


class BenchEngine:
    """A `SteppedLLM` that runs workloads; see there for `facts`."""

    def __init__(self, spec: EngineSpec) -> None:
        from ..integration.stepped import SteppedLLM

        self._kind = spec.kind
        self._llm = SteppedLLM(keywords_of(spec), with_plugin=spec.kind != "plain")
        self.facts = self._llm.facts
        self.peak_bytes = self._llm.peak_bytes
        self.shutdown = self._llm.shutdown
        self._prompts: list[list[int]] = []
        self._adapters: list[Any] = []
        self._runs = 0

    def run(self, job: Job, pipe: Connection) -> list[Timing]:
        """Run a workload and time it."""
        workload = job.workload
        # Made before the clock starts.
        self._prompts = [
            workload.prompt(index, self._llm.vocabulary) for index in range(len(workload.requests))
        ]
        self._adapters = [
            self._llm.adapter(self._kind, name, number, folder)
            for number, (name, folder) in enumerate(job.adapters, 1)
        ]
        self._runs += 1
        self._llm.reset_prefix_cache()
        last = time.monotonic()

        def tell(tokens: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                pipe.send(("progress", tokens))

        if workload.beam_width > 1:
            return self._beam_search(job)
        return drive(self, workload, tell=tell)

    def _adapter_of(self, request: Request) -> Any:
        return None if request.tenant is None else self._adapters[request.tenant]

    def add(self, index: int, request: Request) -> None:
        """Hand a request to vLLM."""
        adapter = self._adapter_of(request)
        name = f"{self._runs}-{index}"
        self._llm.add(name, self._prompts[index], request.output_tokens, adapter)

    def step(self) -> Sequence[Progress]:
        """One step of vLLM."""
        return [
            Progress(int(name.partition("-")[2]), new, finished)
            for name, new, finished in self._llm.step()
        ]

    def _beam_search(self, job: Job) -> list[Timing]:
        workload = job.workload
        # One length for all is what beam_search takes; groups of a length run one after the other.
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(workload.requests):
            groups.setdefault(request.output_tokens, []).append(index)
        timings = [Timing(r.tenant, r.prompt_tokens, 0.0) for r in workload.requests]
        start = time.perf_counter()
        for length, members in groups.items():
            self._llm.beam_search(
                [self._prompts[i] for i in members],
                workload.beam_width,
                length,
                [self._adapter_of(workload.requests[i]) for i in members],
            )
            end = time.perf_counter() - start
            for i in members:
                timings[i].tokens = [end] * length
        return timings
