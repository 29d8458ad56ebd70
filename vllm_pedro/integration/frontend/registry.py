"""Adapter folders that requests name: what is in them, and whether they changed since."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import BoundedSemaphore, Lock, Thread
from typing import Any, TypeVar

import msgspec

from ...adapter import (
    WEIGHTS_NAME,
    fetch_adapter,
    fetch_config,
    inspect_adapter,
    may_be_repository,
    repository_of,
    verify_adapter,
)
from ...config import CONFIG_NAME, PEFT_TYPE, peft_type_of
from ...errors import AdapterError
from ...serving.adapters import AdapterLimits
from ..request import PedroRequest
from .notes import FolderNotes

T = TypeVar("T")

Signature = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class KnownAdapter:
    """A folder that was read and found good.

    Attributes:
        digest: Content digest.
        pools: Whose states generate its vectors: "last", "all" (mean, max) or "none" (static).
        nbytes: What it takes of the device's memory for adapters.
        signature: What the files looked like, to notice that they changed.
        scope: Which tokens it scales: "sequence" or "answer".
    """

    digest: str
    pools: str
    nbytes: int
    signature: Signature
    scope: str = "sequence"


class AdapterRegistry:
    """Folders that requests named, validated when first seen and again when their files change.

    May be asked from several threads.
    """

    def __init__(
        self, limits: AdapterLimits, capacity: int = 100_000, notes: FolderNotes | None = None
    ) -> None:
        self.limits = limits
        self._notes = notes
        self._capacity = capacity
        self._known: OrderedDict[str, KnownAdapter] = OrderedDict()
        self._fetched: dict[str, str] = {}
        self._fetches: dict[str, tuple[Future[str], float]] = {}  # and until when it is shared
        self._lock = Lock()

    def fetch(self, path: str) -> str:
        """The folder that a path means; of a repository of the hub, after asking it anew.

        Raises:
            AdapterError: It cannot be had.
        """
        repository = repository_of(path)
        if repository is None:
            return os.path.realpath(os.path.expanduser(path))
        limits = self.limits
        folder = str(fetch_adapter(repository, limits.shape, limits.check_config).resolve())
        with self._lock:
            self._fetched[path] = folder
        return folder

    def lookup(self, path: str) -> KnownAdapter:
        """The adapter in a folder.

        Raises:
            AdapterError: What is wrong with it; or that reading it took too long.
        """
        signature = _signature(path)
        with self._lock:
            known = self._known.get(path)
            if known is not None and known.signature == signature and signature is not None:
                self._known.move_to_end(path)
                return known
        return READING.wait(path, READING.start(path, lambda: self.read(path)))

    def locate(self, path: str) -> str:
        """The folder that a request's path means; a repository is fetched once in a process.

        Raises:
            AdapterError: It cannot be had; or that took too long.
        """
        if not may_be_repository(path):
            return self.fetch(path)
        return self._fetched.get(path) or FETCHING.wait(path, self.start_locating(path))

    def start_locating(self, path: str) -> Future[str]:
        """`locate` in a thread of its own, which requests that come meanwhile share."""
        with self._lock:
            shared, until = self._fetches.get(path, (None, 0.0))
            if shared is not None and time.monotonic() < until:
                return shared
            fetch = FETCHING.start(path, lambda: self._fetched.get(path) or self.fetch(path))
            self._fetches[path] = fetch, time.monotonic() + FETCHING.seconds()
        fetch.add_done_callback(lambda done: self._end_locating(path, done))
        return fetch

    def _end_locating(self, path: str, done: Future[str]) -> None:
        with self._lock:
            if self._fetches.get(path, (None, 0.0))[0] is done:
                del self._fetches[path]

    def read(self, path: str) -> KnownAdapter:
        """Read a folder whether it seems to have changed or not, values included.

        Raises:
            AdapterError: What is wrong with it.
        """
        signature = _signature(path)
        config, digest, dtype = verify_adapter(
            path,
            self.limits.shape,
            check=lambda config: self.limits.check_config(config, path),
        )
        nbytes = self.limits.check_bytes(config, dtype, path)
        pools = "none" if config.r == 0 else "last" if config.pooling == "last" else "all"
        known = KnownAdapter(digest, pools, nbytes, signature or (), config.scope)
        if self._notes is not None:
            self._notes.base_model(config.base_model_name_or_path, path)
            self._notes.files(path)
        with self._lock:
            self._known[path] = known
            self._known.move_to_end(path)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return known

    def inspect(self, path: str) -> None:
        """Check a folder as far as that goes without reading its weights.

        Raises:
            AdapterError: What is wrong with it.
        """
        config = inspect_adapter(path, self.limits.shape)
        self.limits.check_config(config, path)
        if self._notes is not None:
            self._notes.base_model(config.base_model_name_or_path, path)

    def forget(self, path: str) -> None:
        """Drop what is known of a folder."""
        with self._lock:
            self._known.pop(path, None)


READ_SECONDS = 30.0
"""What reading a folder may take: a file server may not answer."""

FETCH_SECONDS = 600.0
"""What asking the hub and downloading may take."""

MAX_READS = 64
"""Folders that are read or fetched at a time, those that hang included."""

_reads = BoundedSemaphore(MAX_READS)


@dataclass(frozen=True, slots=True)
class TimedWork:
    """Work in a thread of its own, which is left behind if it hangs.

    Attributes:
        name: What it does with an adapter, for messages.
        seconds: Reads what it may take.
        culprit: What does not answer then.
    """

    name: str
    seconds: Callable[[], float]
    culprit: str

    def wait(self, path: str, work: Future[T]) -> T:
        """The result of work that was started.

        Raises:
            AdapterError: Of the work; or that it took too long.
        """
        try:
            return work.result(self.seconds())
        except TimeoutError:
            raise self._overdue(path) from None

    async def wait_async(self, path: str, work: Future[T]) -> T:
        """`wait`, beside the event loop."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), self.seconds())
        except TimeoutError:
            raise self._overdue(path) from None

    def start(self, path: str, work: Callable[[], T]) -> Future[T]:
        """Start work; no waiter that gives up cancels it.

        Raises:
            AdapterError: Too much of it is under way.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
            finally:
                _reads.release()

        if not _reads.acquire(blocking=False):
            raise AdapterError(
                f"{path}: not read, as {MAX_READS} reads of adapters are under way or hang"
            )
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        Thread(target=run, name="pedro-read", daemon=True).start()
        return future

    def _overdue(self, path: str) -> AdapterError:
        return AdapterError(
            f"{path}: {self.name} the adapter took more than {self.seconds():g} s: {self.culprit} "
            "does not answer"
        )


READING = TimedWork("reading", lambda: READ_SECONDS, "the disk or file server that it is on")
FETCHING = TimedWork("downloading", lambda: FETCH_SECONDS, "the hub")


async def read_in_time(registry: AdapterRegistry, path: str) -> KnownAdapter:
    """`AdapterRegistry.read` beside the event loop.

    Raises:
        AdapterError: What is wrong with the folder; or that it took too long.
    """
    return await READING.wait_async(path, READING.start(path, lambda: registry.read(path)))


async def fetch_in_time(registry: AdapterRegistry, path: str) -> str:
    """`AdapterRegistry.fetch` beside the event loop; the hub is asked each time.

    Raises:
        AdapterError: It cannot be had; or that took too long.
    """
    return await FETCHING.wait_async(path, FETCHING.start(path, lambda: registry.fetch(path)))


async def fetch_config_in_time(path: str) -> str:
    """The folder of a repository, with its config alone.

    Raises:
        AdapterError: It cannot be had; or that took too long.
    """
    repository = repository_of(path)
    assert repository is not None, path
    config = FETCHING.start(path, lambda: str(fetch_config(repository)))
    return await FETCHING.wait_async(path, config)


async def locate_in_time(registry: AdapterRegistry, request: PedroRequest) -> PedroRequest:
    """A request for the folder of the one given, which may name a repository.

    Raises:
        AdapterError: See `AdapterRegistry.locate`.
    """
    path = request.lora_path
    if not may_be_repository(path):
        return request
    folder = await FETCHING.wait_async(path, registry.start_locating(path))
    return msgspec.structs.replace(request, lora_path=folder)


def _signature(path: str) -> Signature | None:
    try:
        stats = [os.stat(os.path.join(path, name)) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    # A file that is rewritten in place may get its old time back, but not its time of change.
    return tuple((s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for s in stats)


def pedro_request_of(lora_request: Any) -> PedroRequest | None:
    """The request for a PEDRO adapter that this is, by its type or by what its folder says.

    Reads the folder's config, unless the type tells.
    """
    if lora_request is None or isinstance(lora_request, PedroRequest):
        return lora_request
    if peft_type_of(lora_request.lora_path) != PEFT_TYPE:
        return None
    return PedroRequest(
        **{name: getattr(lora_request, name) for name in lora_request.__struct_fields__}
    )
