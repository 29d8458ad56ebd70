"""Adapter folders that requests name: what is in them, and whether they changed since."""

from __future__ import annotations

import asyncio
import json
import os
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from typing import Any

from ...adapter import WEIGHTS_NAME, inspect_adapter, verify_adapter
from ...config import CONFIG_NAME, MAX_CONFIG_BYTES
from ...errors import AdapterError
from ...serving.adapters import AdapterLimits
from ..request import PedroRequest

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

    def __init__(self, limits: AdapterLimits, capacity: int = 100_000) -> None:
        self.limits = limits
        self._capacity = capacity
        self._known: OrderedDict[str, KnownAdapter] = OrderedDict()
        self._lock = Lock()

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
        try:
            return _start_reading(self, path).result(READ_SECONDS)
        except TimeoutError:
            raise _overdue(path) from None

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

    def forget(self, path: str) -> None:
        """Drop what is known of a folder."""
        with self._lock:
            self._known.pop(path, None)


READ_SECONDS = 30.0
"""What reading a folder may take: a file server may not answer."""

MAX_READS = 64
"""Folders that are read at a time, those that hang included."""

_reads = BoundedSemaphore(MAX_READS)


async def read_in_time(registry: AdapterRegistry, path: str) -> KnownAdapter:
    """`AdapterRegistry.read` in a thread of its own, which is left behind if it hangs.

    Raises:
        AdapterError: What is wrong with the folder; or that it took too long.
    """
    future = _start_reading(registry, path)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), READ_SECONDS)
    except TimeoutError:
        raise _overdue(path) from None


def _start_reading(registry: AdapterRegistry, path: str) -> Future[KnownAdapter]:
    future: Future[KnownAdapter] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        try:
            future.set_result(registry.read(path))
        except Exception as error:
            future.set_exception(error)
        finally:
            _reads.release()

    if not _reads.acquire(blocking=False):
        raise AdapterError(
            f"{path}: not read, as {MAX_READS} reads of adapters are under way or hang"
        )
    Thread(target=run, name="pedro-read", daemon=True).start()
    return future


def _overdue(path: str) -> AdapterError:
    return AdapterError(
        f"{path}: reading the adapter took more than {READ_SECONDS:g} s: the disk or file server "
        "that it is on does not answer"
    )


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
    if peft_type_of(lora_request.lora_path) != "PEDRO":
        return None
    return PedroRequest(
        **{name: getattr(lora_request, name) for name in lora_request.__struct_fields__}
    )


def peft_type_of(folder: str) -> str | None:
    """What an adapter folder says it is; None where it cannot be read."""
    try:
        config = Path(folder).expanduser() / CONFIG_NAME
        if config.stat().st_size > MAX_CONFIG_BYTES:
            return None
        content = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    kind = content.get("peft_type") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None
