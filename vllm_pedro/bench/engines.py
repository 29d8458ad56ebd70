"""Engines in processes of their own, so that each one's memory and start-up can be told apart."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from .cases import EngineSpec, Job
from .driver import Timing
from .worker import serve

CLOSE_SECONDS: Final = 30.0
TAIL: Final = 12  # lines of an engine's log in an error


@contextlib.contextmanager
def _huge_pages() -> Iterator[None]:
    """Let processes that are started now have huge pages, where the system leaves it to them.

    Without huge pages, speed depends on page placement: of equal engines the slowest took 5 %
    longer than the fastest, with huge pages less than 1 % (docs/benchmarks.md).
    """
    ours = {"THP_MEM_ALLOC_ENABLE": "1"}  # torch's tensors
    if "glibc.malloc.hugetlb" not in (given := os.environ.get("GLIBC_TUNABLES", "")):
        ours["GLIBC_TUNABLES"] = ":".join(filter(None, (given, "glibc.malloc.hugetlb=1")))
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class EngineProcess:
    """A running engine.

    Attributes:
        spec: What it was started with.
        facts: Its memory and start-up times; see `SteppedLLM`.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        started = time.perf_counter()
        self._process = context.Process(target=serve, args=(theirs, spec, str(log)), daemon=False)
        with _huge_pages():
            self._process.start()
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._answer("ready")
        except BaseException:
            self.close()
            raise
        self.facts["start_s"] = time.perf_counter() - started

    def run(self, job: Job, tell: Callable[[int], None] = lambda tokens: None) -> list[Timing]:
        """Run a workload; `tell` hears how many tokens have come out.

        Raises:
            PedroError: The engine failed.
        """
        self._pipe.send(("run", job))
        return self._answer("timings", tell)

    def peak_bytes(self) -> dict[str, int]:
        """Highest memory use so far: `host` (resident set), and `device` on a GPU."""
        self._pipe.send(("peak", None))
        return self._answer("peak")

    def close(self) -> None:
        """End the process, whatever state it is in."""
        with contextlib.suppress(OSError, ValueError):
            self._pipe.send(("close", None))
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _answer(self, expected: str, tell: Callable[[int], None] = lambda tokens: None) -> Any:
        name = f"the engine ({self.spec.engine.label})"
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join(10)
                status = self._process.exitcode
                raise PedroError(f"{name} ended with status {status}; {self._tail()}") from None
            if kind == "progress":
                tell(value)
            elif kind == "failed":
                raise PedroError(f"{name} failed: {value}; {self._tail()}")
            else:
                assert kind == expected, (kind, expected)
                return value

    def _tail(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return "its log ends: " + " | ".join(lines[-TAIL:]) if lines else "it wrote no log"


@contextlib.contextmanager
def start_engines(
    specs: Sequence[EngineSpec], begin: Callable[[EngineSpec], None] = lambda spec: None
) -> Iterator[list[EngineProcess]]:
    """Start engines one after the other; all are ended at the end, however it comes."""
    engines: list[EngineProcess] = []
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-bench-") as folder:
        try:
            for number, spec in enumerate(specs):
                begin(spec)
                engines.append(EngineProcess(spec, Path(folder, f"engine-{number}.log")))
            yield engines
        finally:
            for engine in engines:
                engine.close()


def available_threads() -> int:
    """OpenMP threads to give each engine: OMP_NUM_THREADS, or one for each core."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
