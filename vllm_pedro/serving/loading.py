"""Adapters that come from disk beside the batch: what workers read, and what schedulers ask for.

The scheduler asks for a request's adapter as soon as the request is queued, with the next step. The
worker reads, checks, digests and packs it in a thread, and reports it with a later step; until then
the request is passed over, and those behind it start. Nothing depends on it for being right: an
adapter that is not there when a step needs it is read then.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..adapter import StoredAdapter
from ..errors import AdapterError, PedroError, first_line
from .spec import RequestSpec

# Workers -----------------------------------------------------------------------------------------


class Blob(NamedTuple):
    """An adapter in host memory.

    Attributes:
        path: The folder it came from.
        rank: Its r.
        data: `[nbytes]` uint8.
        seconds: How long reading and packing it took.
    """

    path: str
    rank: int
    data: Tensor
    seconds: float


class Reader(Protocol):
    """What `AdapterReader` does."""

    def read(self, spec: RequestSpec) -> StoredAdapter:
        """The adapter from its folder."""

    def nbytes(self, adapter: StoredAdapter) -> int:
        """Bytes of its blob."""

    def pack(self, adapter: StoredAdapter, blob: Tensor) -> None:
        """Write its blob."""


Key = tuple[str, str]
"""Digest and folder: one content may be in several, of which one is gone."""


@dataclass(slots=True, eq=False)
class _Load:
    """An adapter that is to be read, is read, or was.

    Attributes:
        outcome: What came of it.
        began: When a thread took it up, by `time.monotonic`.
        is_new: Nobody was told the outcome.
    """

    spec: RequestSpec
    outcome: Blob | PedroError | None = None
    began: float | None = None
    is_new: bool = True


class AdapterLoader:
    """Reads adapters in threads of its own, several at a time.

    A read that does not end, of a disk or file server that hangs, fails after a limit; others do
    not wait for it. Its thread cannot be stopped and is left behind.

    Args:
        reader: How an adapter is read and packed.
        pin: Whether a device copies the blobs, without the host waiting for it.
        limit: Seconds that one adapter may take.
    """

    THREADS = 4
    """Reads at a time. More do not help: the checks compute."""

    SLOW = 0.5
    """Seconds after which a read waits for its disk, so that another may begin beside it."""

    MAX_THREADS = 64
    """Slow reads and all; where all of them are overdue, further loads fail at once."""

    MAX_HINTS = 8
    """Loads under way or not taken, up to which a hint is followed."""

    MAX_OUTCOMES = 32
    """Outcomes that are kept while nobody takes them: their requests were aborted."""

    def __init__(self, reader: Reader, pin: bool = False, limit: float = 30.0) -> None:
        self.limit = limit
        self._reader = reader
        self._pin = pin
        self._loads: dict[Key, _Load] = {}
        self._queue: deque[_Load] = deque()
        self._threads = 0
        # Guards all of the above, and is notified of each outcome.
        self._changed = threading.Condition()

    @property
    def is_busy(self) -> bool:
        """Whether an outcome is to come."""
        return any(load.outcome is None for load in self._loads.values())

    def ask(self, spec: RequestSpec) -> None:
        """Have an adapter read, unless it is being read; once more, if that failed."""
        with self._changed:
            self._poll()
            load = self._loads.get(_key(spec))
            if load is None or isinstance(load.outcome, PedroError):
                self._start(spec)

    def hint(self, spec: RequestSpec, max_bytes: int) -> None:
        """Have an adapter read that will be asked for; unless much is read already.

        Args:
            spec: The request for it.
            max_bytes: Bytes of adapters that may be under way or not taken then.
        """
        with self._changed:
            loads = [w for w in self._loads.values() if not isinstance(w.outcome, PedroError)]
            nbytes = spec.nbytes + sum(load.spec.nbytes for load in loads)
            is_much = len(loads) >= self.MAX_HINTS or nbytes > max_bytes
            if _key(spec) not in self._loads and not is_much:
                self._start(spec)

    def has(self, spec: RequestSpec) -> bool:
        """Whether an adapter was read and not taken."""
        with self._changed:
            load = self._loads.get(_key(spec))
            return load is not None and isinstance(load.outcome, Blob)

    def take(self, spec: RequestSpec) -> Blob:
        """An adapter that was asked for, or is now; waits for it.

        Raises:
            AdapterError: It could not be read, or not within the limit.
        """
        key = _key(spec)
        with self._changed:
            load = self._loads.get(key) or self._start(spec)
            while load.outcome is None:
                self._changed.wait(0.05)
                self._poll()
            if isinstance(load.outcome, PedroError):
                # Kept: other requests of the step want it too.
                raise load.outcome
            self._loads.pop(key, None)
            return load.outcome

    def forget_failure(self, spec: RequestSpec) -> None:
        """The step whose requests could not have an adapter is over: the next one tries again.

        Nobody may ask for it first: the scheduler hears one rank, which may have read it.
        """
        with self._changed:
            load = self._loads.get(_key(spec))
            if load is not None and isinstance(load.outcome, PedroError):
                del self._loads[_key(spec)]

    def finished(self) -> list[tuple[RequestSpec, bool]]:
        """Loads that ended since it was last asked, and whether they went well."""
        with self._changed:
            self._poll()
            ended = [load for load in self._loads.values() if load.outcome and load.is_new]
            for load in ended:
                load.is_new = False
            known = [key for key, load in self._loads.items() if load.outcome and not load.is_new]
            for key in known[: -self.MAX_OUTCOMES]:
                del self._loads[key]
            return [(load.spec, isinstance(load.outcome, Blob)) for load in ended]

    def wait(self, seconds: float) -> None:
        """Wait for an outcome that `finished` would give, if any is to come."""
        with self._changed:
            loads = self._loads.values()
            if self.is_busy and not any(load.outcome and load.is_new for load in loads):
                self._changed.wait(seconds)

    def settle(self, seconds: float) -> None:
        """Wait for the reads that began less than so long ago, and at most so long."""
        now = time.monotonic()
        end = now + seconds
        with self._changed:
            while now < end and any(now - began < seconds for began in self._reading()):
                self._changed.wait(end - now)
                now = time.monotonic()

    # Inside, with the lock held.

    def _reading(self) -> list[float]:
        """When the reads that are under way began."""
        return [load.began for load in self._loads.values() if load.began and not load.outcome]

    def _start(self, spec: RequestSpec) -> _Load:
        load = self._loads[_key(spec)] = _Load(spec)
        self._queue.append(load)
        self._start_threads()
        return load

    def _start_threads(self) -> None:
        if not self._queue:
            return
        now = time.monotonic()
        reading = self._reading()
        busy = sum(now - began < self.SLOW for began in reading)
        while self._queue and busy < self.THREADS and self._threads < self.MAX_THREADS:
            load = self._queue.popleft()
            load.began = now
            busy += 1
            self._threads += 1
            # A daemon, so that a read that hangs does not keep the process from ending.
            threading.Thread(target=self._run, args=(load,), name="pedro-load", daemon=True).start()
        if self._queue and not reading:
            for load in self._queue:
                load.outcome = AdapterError(
                    f"{load.spec.path}: not read, as {self._threads} reads of adapters hang"
                )
            self._queue.clear()

    def _poll(self) -> None:
        now = time.monotonic()
        for load in self._loads.values():
            if load.outcome is None and load.began and now - load.began > self.limit:
                load.outcome = AdapterError(
                    f"{load.spec.path}: reading the adapter took more than {self.limit:g} s: the "
                    "disk or file server that it is on does not answer"
                )
        self._start_threads()

    # Inside, in a thread.

    def _run(self, load: _Load) -> None:
        outcome = self._read(load.spec)
        with self._changed:
            self._threads -= 1
            if load.outcome is None:  # not overdue
                load.outcome = outcome
            self._start_threads()
            self._changed.notify_all()

    def _read(self, spec: RequestSpec) -> Blob | PedroError:
        start = time.perf_counter()
        try:
            adapter = self._reader.read(spec)
            size = self._reader.nbytes(adapter)
            data = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
            self._reader.pack(adapter, data)
            seconds = time.perf_counter() - start
            return Blob(adapter.path, adapter.config.r, data, seconds)
        except PedroError as error:
            return error
        except Exception as error:
            return AdapterError(f"{spec.path}: the adapter could not be read: {first_line(error)}")


def _key(spec: RequestSpec) -> Key:
    return spec.digest, spec.path


# Schedulers --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Wanted:
    """An adapter that waiting requests need and that is not in memory.

    Attributes:
        spec: A request for it.
        waiting: The requests.
        is_ready: The worker reported; what failed is ready, too: the step says why.
        has_failed: It could not be read.
        attempts: How often a worker was asked.
        asked: When it was, by `time.monotonic`.
    """

    spec: RequestSpec
    waiting: set[str] = field(default_factory=set)
    is_ready: bool = False
    has_failed: bool = False
    attempts: int = 0
    asked: float = math.inf


class Prefetches:
    """Which adapters workers are asked for, as requests are queued.

    Args:
        max_bytes: Bytes of adapters that are asked for and that no step has read yet.
        max_adapters: Most of them. Else they would put one another out of memory.
    """

    MAX_ATTEMPTS = 3
    """An adapter that is put out of memory so often before its step is read in that step."""

    PATIENCE = 60.0
    """Seconds after which a worker that has not answered is asked again: its limit is half."""

    def __init__(self, max_bytes: int, max_adapters: int = 16) -> None:
        self._max_bytes = max_bytes
        self._max_adapters = max_adapters
        self._wanted: dict[str, _Wanted] = {}
        self._asked: dict[str, int] = {}  # bytes of those that a worker was asked for
        self._digests: dict[str, str] = {}  # of the requests that wait
        self._resident: set[str] = set()
        self._urgent: set[str] = set()

    def want(self, request_id: str, spec: RequestSpec) -> None:
        """A request waits, and needs this adapter."""
        if spec.digest in self._resident and spec.digest not in self._wanted:
            return
        if self._digests.get(request_id) == spec.digest:
            return
        self.forget(request_id)
        wanted = self._wanted.setdefault(spec.digest, _Wanted(spec))
        if wanted.has_failed:  # before this request came
            self._wanted[spec.digest] = wanted = _Wanted(spec, wanted.waiting)
            self._asked.pop(spec.digest, None)
        wanted.waiting.add(request_id)
        self._digests[request_id] = spec.digest

    def is_due(self, request_id: str, spec: RequestSpec, is_urgent: bool = False) -> bool:
        """Whether a request may go on; else its adapter is on its way.

        Args:
            request_id: The request.
            spec: What it asks for.
            is_urgent: It is running, so its adapter is asked for whatever others are: those may
                wait for its place in the batch.
        """
        if spec.digest in self._resident:
            return True
        self.want(request_id, spec)
        wanted = self._wanted[spec.digest]
        if is_urgent:
            self._urgent.add(spec.digest)
        if time.monotonic() - wanted.asked > self.PATIENCE:
            wanted.asked = math.inf
            self._asked.pop(spec.digest, None)
        return wanted.is_ready or wanted.attempts > self.MAX_ATTEMPTS

    def forget(self, request_id: str) -> None:
        """The request starts, or is gone."""
        digest = self._digests.pop(request_id, None)
        if digest is not None and (wanted := self._wanted.get(digest)) is not None:
            wanted.waiting.discard(request_id)
            if not wanted.waiting:
                del self._wanted[digest]
                self._asked.pop(digest, None)

    def take(self) -> list[RequestSpec]:
        """What to ask workers for now, first come, first served."""
        # Thousands may wait: this ends at the first that does not fit.
        nbytes, taken = sum(self._asked.values()), []
        urgent, self._urgent = self._urgent, set()
        for digest in chain(sorted(self._wanted.keys() & urgent), self._wanted):
            if digest in self._asked:
                continue
            wanted = self._wanted[digest]
            nbytes += wanted.spec.nbytes
            is_full = len(self._asked) >= self._max_adapters or nbytes > self._max_bytes
            if self._asked and is_full and digest not in urgent:
                break
            self._asked[digest] = wanted.spec.nbytes
            wanted.attempts += 1
            wanted.asked = time.monotonic()
            taken.append(wanted.spec)
        return taken

    def report(self, loaded: dict[str, bool], lost: Iterable[str]) -> None:
        """What a worker says: adapters that it read, or could not, and those it has no longer."""
        for digest, is_well in loaded.items():
            if is_well:
                self._resident.add(digest)
            wanted = self._wanted.get(digest)
            if wanted is not None:
                wanted.is_ready, wanted.has_failed = True, not is_well
        for digest in lost:
            self._resident.discard(digest)
            wanted = self._wanted.get(digest)
            if wanted is not None:
                wanted.is_ready = wanted.has_failed = False
                self._asked.pop(digest, None)
