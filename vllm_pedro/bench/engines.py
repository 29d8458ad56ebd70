"""Engines in processes of their own, so that each one's memory and start-up can be told apart."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError, first_line
from .cases import engine_label, split
from .driver import Timing, drive
from .workloads import Request, Workload

CLOSE_SECONDS: Final = 30.0
TAIL: Final = 12  # lines of an engine's log in an error


class EngineProcess:
    """A running engine.

    Args:
        engine: Of `cases.ENGINES`.
        keywords: `LLM`'s.
        log: A file for what it prints.

    Attributes:
        facts: Its memory and start-up times; see `SteppedLLM`. Empty until `wait` returns.
    """

    facts: dict[str, Any]

    def __init__(self, engine: str, keywords: dict[str, Any], log: Path) -> None:
        self._name, self._log = f"the engine ({engine_label(engine)})", log
        # Without huge pages, speed depends on page placement: of equal engines the slowest took 5 %
        # longer than the fastest, with huge pages less than 1 % (docs/benchmarks.md).
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's tensors
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.facts, self._started = {}, time.perf_counter()
        self._process = context.Process(target=serve, args=(theirs, engine, keywords, str(log)))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it has started.

        Raises:
            PedroError: It does not start.
        """
        self.facts |= self._answer()
        self.facts["start_s"] = time.perf_counter() - self._started

    def run(self, workload: Workload, adapters: Sequence[Path] = ()) -> list[Timing]:
        """Run a workload; its tenants' adapters by number.

        Raises:
            PedroError: The engine failed.
        """
        self._pipe.send((workload, [str(path) for path in adapters]))
        return self._answer()

    def profile(
        self, workload: Workload, adapters: Sequence[Path], steps: int
    ) -> dict[str, tuple[float, int]]:
        """Own time in µs and calls of each operator in as many steps, once all requests have a
        token; on a GPU of each kernel. What is outside of them has the name `""`.

        Raises:
            PedroError: The engine failed.
        """
        self._pipe.send((workload, [str(path) for path in adapters], steps))
        return self._answer()

    def peak_bytes(self) -> dict[str, int]:
        """Highest memory use so far: `host` (resident set), and `device` on a GPU."""
        self._pipe.send(None)
        return self._answer()

    def close(self) -> None:
        """End the process, whatever state it is in."""
        self._pipe.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            self._process.join(CLOSE_SECONDS)
            if self._process.exitcode is not None:
                break

    def _answer(self) -> Any:
        try:
            failed, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            failed = f"ended with status {self._process.exitcode}"
        if failed:
            text = self._log.read_text(errors="replace") if self._log.exists() else ""
            lines = text.strip().splitlines()
            tail = "its log ends: " + " | ".join(lines[-TAIL:]) if lines else "it wrote no log"
            raise PedroError(f"{self._name} {failed}; {tail}")
        return value


def serve(pipe: Connection, engine: str, keywords: dict[str, Any], log: str) -> None:
    """The main function of the process that `EngineProcess` spawns: start an engine, then run what
    comes down the pipe until the other end is closed or gone."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    # Threads are not bound to cores, because several engines share them in turns.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(available_threads())
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from ..integration.stepped import SteppedLLM

    kind, _ = split(engine)
    with contextlib.ExitStack() as stack:
        try:
            llm = SteppedLLM(keywords, with_plugin=kind != "plain")
            stack.callback(llm.shutdown)
            pipe.send((None, llm.facts))
            while True:
                task = pipe.recv()
                if task is None:
                    answer: Any = llm.peak_bytes()
                else:
                    answer = (run if len(task) == 2 else profile)(llm, kind, *task)
                pipe.send((None, answer))
        except (EOFError, BrokenPipeError):
            pass  # the parent is done, or gone
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            pipe.send((f"failed: {type(error).__name__}: {first_line(error)}", None))


def prepare(
    llm: Any, kind: str, workload: Workload, folders: Sequence[str]
) -> tuple[list[list[int]], list[Any]]:
    """Prompts and adapters of a workload's requests, made before a clock starts."""
    requests = workload.requests
    prompts = [workload.prompt(index, llm.vocabulary) for index in range(len(requests))]
    tenants = [llm.adapter(kind, Path(f).name, i, f) for i, f in enumerate(folders, 1)]
    adapters = [None if r.tenant is None else tenants[r.tenant] for r in requests]
    llm.begin()
    return prompts, adapters


def profile(
    llm: Any, kind: str, workload: Workload, folders: Sequence[str], steps: int
) -> dict[str, tuple[float, int]]:
    """See `EngineProcess.profile`."""
    import torch

    prompts, adapters = prepare(llm, kind, workload, folders)
    waiting = set(range(len(prompts)))
    running = set(waiting)

    def step() -> None:
        for index, new_tokens, finished in llm.step():
            waiting.difference_update([index] * (new_tokens > 0))
            running.difference_update([index] * finished)

    for index, request in enumerate(workload.requests):
        llm.add(index, prompts[index], request.output_tokens, adapters[index])
    while waiting:
        step()
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    start = time.perf_counter()
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
        for _ in range(steps):
            step()
        outside = 1e6 * (time.perf_counter() - start)
    found = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[event.key] = own, event.count
        outside -= own
    while running:
        step()
    return found | {"": (outside, steps)}


def run(llm: Any, kind: str, workload: Workload, folders: Sequence[str]) -> list[Timing]:
    """Run a workload on a `SteppedLLM` and time it."""
    requests = workload.requests
    prompts, adapters = prepare(llm, kind, workload, folders)

    def add(index: int, request: Request) -> None:
        llm.add(index, prompts[index], request.output_tokens, adapters[index])

    if workload.beam_width == 1:
        return drive(add, llm.step, workload)
    # One length for all is what beam_search takes; groups of a length run one after the other.
    timings = [Timing(r.tenant, 0.0) for r in requests]
    start = time.perf_counter()
    for length in dict.fromkeys(r.output_tokens for r in requests):
        members = [i for i, r in enumerate(requests) if r.output_tokens == length]
        mine = ([values[i] for i in members] for values in (prompts, adapters))
        llm.beam_search(*mine, workload.beam_width, length)
        end = time.perf_counter() - start
        for i in members:
            timings[i].tokens = [end] * length
    return timings


def available_threads() -> int:
    """OpenMP threads to give each engine: OMP_NUM_THREADS, or one for each core."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else len(os.sched_getaffinity(0))
