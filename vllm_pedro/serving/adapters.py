"""Adapters in memory: blobs in host memory, and in the arena that prefills read."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import StoredAdapter, read_adapter
from ..backbone import TARGET_MODULES, BackboneShape
from ..config import PedroConfig
from ..errors import AdapterError
from ..ops.layout import UNIT, aligned
from .arena import Span, Spans
from .blobs import ALIGNMENT, blob_bytes, blob_layout, most_bytes, pack
from .columns import StoreColumns
from .loading import AdapterLoader, Blob
from .spec import RequestSpec
from .stats import AdapterStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What an engine accepts, fixed at start-up.

    Attributes:
        shape: The backbone's layer count and widths.
        max_rank: Highest `r` an adapter may have.
        modules: Target modules the vector store has columns for.
        memory: Bytes that the device has for adapters; None where nothing is to be refused for it.
    """

    shape: BackboneShape
    max_rank: int
    modules: tuple[str, ...] = TARGET_MODULES
    memory: int | None = None

    def check(self, rank: int, target_modules: Sequence[str], source: str) -> None:
        """Refuse an adapter that this engine has no room for.

        Raises:
            AdapterError: Names the folder, the limit and the option that raises it.
        """
        if rank > self.max_rank:
            raise AdapterError(
                f"{source}: r is {rank}, but this engine takes at most {self.max_rank}: start it "
                f"with max_pedro_rank={rank} (--max-pedro-rank {rank})"
            )
        missing = [m for m in target_modules if m not in self.modules]
        if missing:
            raise AdapterError(
                f"{source}: target_modules has {', '.join(missing)}, but this engine serves only "
                f"{', '.join(self.modules)}: start it with pedro_target_modules that has them all"
            )

    @property
    def largest_blob(self) -> int:
        """What an adapter takes of an arena at most: of the highest rank, with all modules."""
        return most_bytes(self.shape, self.modules, self.max_rank, "float32")

    def check_config(self, config: PedroConfig, source: str) -> None:
        """`check` with an adapter's config."""
        self.check(config.r, config.target_modules, source)

    def check_bytes(self, config: PedroConfig, dtype: str, source: str) -> int:
        """What an adapter takes of the device's memory, if it fits there.

        Args:
            config: The adapter's.
            dtype: Its `StoredAdapter.dtype`.
            source: Its folder, for messages.

        Raises:
            AdapterError: Names the folder, the limit and the option that raises it.
        """
        needed = blob_bytes(config, dtype, self.shape)
        if self.memory is not None and needed > self.memory // ALIGNMENT * ALIGNMENT:
            raise AdapterError(
                f"{source}: the adapter takes {needed} bytes, but this engine has {self.memory} "
                f"for adapters: start it with pedro_memory_bytes={needed} "
                f"(--pedro-memory-bytes {needed})"
            )
        return needed


def short(digest: str) -> str:
    """A digest for log lines."""
    return digest[:12]


class AdapterReader:
    """Reads adapters from their folders, and packs them.

    Args:
        limits: What the engine accepts.
        columns: The vector store's.
        load: What reads a folder.
    """

    def __init__(
        self,
        limits: AdapterLimits,
        columns: StoreColumns,
        load: Callable[..., StoredAdapter] = read_adapter,
    ) -> None:
        self.limits = limits
        self._columns = columns
        self._load = load

    def read(self, spec: RequestSpec) -> StoredAdapter:
        """The adapter from its folder.

        Raises:
            AdapterError: The folder is gone, broken, or no longer has the content that the request
                was admitted with.
        """
        return self._load(
            spec.path,
            self.limits.shape,
            expected_digest=spec.digest,
            check=lambda config: self.limits.check_config(config, spec.path),
        )

    def nbytes(self, adapter: StoredAdapter) -> int:
        """Bytes of the adapter's blob."""
        return blob_layout(adapter.config, adapter.dtype, self._columns).nbytes

    def pack(self, adapter: StoredAdapter, blob: Tensor) -> None:
        """Write the adapter's blob into uint8 of its size or more, on the CPU."""
        pack(adapter, self._columns, blob.numpy())


def _log_loaded(spec: RequestSpec, seconds: float) -> None:
    logger.info(
        "PEDRO: loaded adapter %r (%s) from %s into host memory in %.1f ms",
        spec.name,
        short(spec.digest),
        spec.path,
        1e3 * seconds,
    )


class HostCache:
    """Blobs in host memory by content digest, least recently used out first.

    For devices with memory of their own: on the CPU the arena is host memory.

    Args:
        capacity: Most adapters.
        reader: Where they come from.
        pin: Whether a device copies them, without the host waiting for it.

    Attributes:
        loader: What reads them.
        stats: What happens is counted here.
    """

    def __init__(self, capacity: int, reader: AdapterReader, pin: bool = False) -> None:
        self.capacity = capacity
        self.loader = AdapterLoader(reader, pin)
        self.stats = AdapterStats()
        self._blobs: OrderedDict[str, Blob] = OrderedDict()
        self._evicted: set[str] = set()

    def __len__(self) -> int:
        return len(self._blobs)

    def __contains__(self, digest: str) -> bool:
        return digest in self._blobs

    def get(self, spec: RequestSpec) -> Blob:
        """The adapter, from memory or from its folder.

        Raises:
            AdapterError: See `AdapterReader.read`.
        """
        blob = self._blobs.get(spec.digest)
        if blob is None:
            blob = self.loader.take(spec)
            while len(self._blobs) >= self.capacity:
                victim, evicted = self._blobs.popitem(last=False)
                self._evicted.add(victim)
                self.stats.evictions["host"] += 1
                logger.info("PEDRO: evicted %s (%s) from host memory", evicted.path, short(victim))
            self._blobs[spec.digest] = blob
            self.stats.loaded("host", blob.seconds)
            _log_loaded(spec, blob.seconds)
        else:
            self.stats.hits["host"] += 1
        self._blobs.move_to_end(spec.digest)
        return blob

    def touch(self, digest: str) -> bool:
        """Whether an adapter is there; it is then the last to go."""
        if digest not in self._blobs:
            return False
        self._blobs.move_to_end(digest)
        return True

    def take_evicted(self) -> set[str]:
        """Digests that were dropped since it was last asked."""
        evicted, self._evicted = self._evicted, set()
        return evicted

    def discard(self, digest: str) -> bool:
        """Drop an adapter; whether it was there."""
        blob = self._blobs.pop(digest, None)
        if blob is None:
            return False
        self._evicted.add(digest)
        self.stats.removals["host"] += 1
        logger.info("PEDRO: removed %s (%s) from host memory", blob.path, short(digest))
        return True


@dataclass(slots=True)
class _Resident:
    """An adapter in the arena; the events are CUDA's.

    Attributes:
        rank: Its r.
        copied: The end of the copy, until a step has waited for it.
        read: The end of the last step that reads it.
        came_from: Where it was when it was asked for, until a step has read it.
    """

    rank: int
    copied: Any = None
    read: Any = None
    came_from: str = "device"


class AdapterBank:
    """Adapters on the device: a budget of bytes that blobs of any size share, LRU.

    On CUDA a blob is copied from pinned memory on a stream of its own, while the device works on
    earlier steps. The copy waits for the steps that read what was there before, and the step that
    reads it waits for the copy; the host waits for neither. On the CPU host memory is the device's,
    so that an adapter is packed in its place in the arena, and there is no second copy.

    Args:
        nbytes: The budget.
        reader: Where adapters come from.
        device: Where the arena is.
        host: Adapters in host memory; None where the arena lies there.
        max_adapters: Most adapters, beside those that a step reads; for want of a `host`, which
            has a limit of its own.

    Attributes:
        arena: `[nbytes]` uint8, see `vllm_pedro.ops.layout`. Pages are touched when they are used.
    """

    MOVED_BYTES = 1 << 20
    """Bytes that are moved at a time where blobs are."""

    def __init__(
        self,
        nbytes: int,
        reader: AdapterReader,
        device: torch.device,
        host: HostCache | None = None,
        max_adapters: int | None = None,
    ) -> None:
        self.reader = reader
        self.host = host
        self.max_adapters = max_adapters
        self.loader = AdapterLoader(reader) if host is None else host.loader
        self.stats = AdapterStats()
        # Digests that were here since they were last taken, and may be gone.
        self._evicted: set[str] = set()
        self._spans = Spans(nbytes)
        self.arena = torch.empty(self._spans.capacity, dtype=torch.uint8, device=device)
        self._lru: OrderedDict[str, _Resident] = OrderedDict()
        self._copies = _SideStream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._lru)

    def __contains__(self, digest: str) -> bool:
        return digest in self._lru

    @property
    def stats(self) -> AdapterStats:
        """Where what happens is counted, in host memory too."""
        return self._stats

    @stats.setter
    def stats(self, stats: AdapterStats) -> None:
        self._stats = stats
        if self.host is not None:
            self.host.stats = stats

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self._spans.capacity

    @property
    def used_bytes(self) -> int:
        """Bytes of the adapters in the arena."""
        return self._spans.used

    @property
    def resident(self) -> dict[str, int]:
        """How many adapters are in each tier."""
        return {"device": len(self), "host": len(self if self.host is None else self.host)}

    def state_of(self, digest: str) -> str:
        """Where an adapter is: "device", "host" or "disk"."""
        if digest in self._lru:
            return "device"
        return "host" if self.host is not None and digest in self.host else "disk"

    def place_of(self, digest: str) -> int:
        """Where a resident adapter's blob begins, in units of `ops.layout`; others may move it."""
        return self._spans[digest].begin // UNIT

    def rank_of(self, digest: str) -> int:
        """A resident adapter's r."""
        return self._lru[digest].rank

    def prefetch(self, spec: RequestSpec) -> bool:
        """Have an adapter read beside the batch; whether it is here already."""
        digest = spec.digest
        if digest in self._lru:
            self._lru.move_to_end(digest)
        elif self.host is None or not self.host.touch(digest):
            self.loader.ask(spec)
            return False
        return True

    def hint(self, spec: RequestSpec) -> None:
        """A request is on its way to the scheduler: have its adapter read; from any thread."""
        if self.state_of(spec.digest) == "disk":
            self.loader.hint(spec, self.nbytes // 2)

    def is_at_hand(self, spec: RequestSpec) -> bool:
        """Whether `make_resident` need not wait for a disk."""
        return self.state_of(spec.digest) != "disk" or self.loader.has(spec)

    def collect(self, keep: Collection[str]) -> dict[str, bool]:
        """Take what was read since it was last asked; onto the device, where there is room.

        Args:
            keep: Digests that must not be evicted.

        Returns:
            Digest -> whether it could be read.
        """
        ended = {}
        for spec, is_well in self.loader.finished():
            ended[spec.digest] = is_well
            if not is_well or spec.digest in self._lru:
                continue
            kept = sum(self._spans[digest].size for digest in keep if digest in self._lru)
            if kept + spec.nbytes <= self.nbytes:
                came_from = self.make_resident(spec, keep)
                self._lru[spec.digest].came_from = came_from
            elif self.host is not None:
                self.host.get(spec)
        return ended

    def take_lost(self) -> list[str]:
        """Digests of adapters that are on disk only, since it was last asked."""
        evicted, self._evicted = self._evicted, set()
        if self.host is not None:
            evicted |= self.host.take_evicted()
        return [digest for digest in evicted if self.state_of(digest) == "disk"]

    def make_resident(self, spec: RequestSpec, keep: Collection[str]) -> str:
        """Bring an adapter onto the device.

        Args:
            spec: A request for it.
            keep: Digests that this step reads and that must not be evicted.

        Returns:
            Where it was, as `state_of` says; before it was prefetched, if that was for this.

        Raises:
            AdapterError: See `AdapterReader.read`; the bank is as before.
            RuntimeError: What the step reads takes more than the budget. The scheduler admits no
                such step, so this is a defect.
        """
        digest, state = spec.digest, self.state_of(spec.digest)
        if digest in self._lru:
            resident = self._lru[digest]
            state, resident.came_from = resident.came_from, "device"
            if state == "device":
                self.stats.hits["device"] += 1
        elif self.host is not None:
            blob = self.host.get(spec)
            start = time.perf_counter()
            span = self._take(digest, len(blob.data), keep)
            self._lru[digest] = resident = _Resident(blob.rank)
            target = self.arena[span.begin : span.begin + len(blob.data)]
            if self._copies is None:
                target.copy_(blob.data)
            else:
                resident.copied = self._copies.send(blob.data, target, span)
            self.stats.loaded("device", time.perf_counter() - start)
        else:
            blob = self.loader.take(spec)
            start = time.perf_counter()
            while self.max_adapters is not None and len(self._lru) >= self.max_adapters:
                if not self._evict(keep):
                    break
            span = self._take(digest, len(blob.data), keep)
            self._lru[digest] = _Resident(blob.rank)
            # By NumPy, see `blobs.pack`.
            self.arena.numpy()[span.begin : span.begin + len(blob.data)] = blob.data.numpy()
            self.stats.loaded("host", blob.seconds)
            self.stats.loaded("device", time.perf_counter() - start)
            _log_loaded(spec, blob.seconds)
        self._lru.move_to_end(digest)
        return state

    def discard(self, digest: str) -> None:
        """Free an adapter's memory, wherever it is."""
        if digest in self._lru:
            self._free(digest)
            self.stats.removals["device"] += 1
            if self.host is None:
                self.stats.removals["host"] += 1
                logger.info("PEDRO: removed %s from host memory", short(digest))
        if self.host is not None:
            self.host.discard(digest)

    def before_reading(self, digests: Collection[str]) -> None:
        """A step is about to read these adapters: let the device wait for their copies."""
        if self._copies is not None:
            for digest in digests:
                resident = self._lru[digest]
                if resident.copied is not None:
                    torch.cuda.current_stream().wait_event(resident.copied)
                    resident.copied = None

    def after_reading(self, digests: Collection[str]) -> None:
        """The step that reads them was launched: what takes their places waits for it."""
        if self._copies is not None and digests:
            event = torch.cuda.Event()
            event.record()
            for digest in digests:
                if digest in self._lru:
                    self._lru[digest].read = event

    def _take(self, digest: str, nbytes: int, keep: Collection[str]) -> Span:
        """A span for an adapter: a hole, made by evicting others, or else by moving all blobs."""
        nbytes = aligned(nbytes, ALIGNMENT)
        while True:
            span = self._spans.allocate(digest, nbytes)
            if span is not None:
                return span
            if not self._evict(keep):
                break
        self._compact()
        span = self._spans.allocate(digest, nbytes)
        if span is None:
            raise RuntimeError(
                f"one step's adapters take more than the {self.nbytes} bytes that the device has "
                "for them"
            )
        return span

    def _evict(self, keep: Collection[str]) -> bool:
        victim = next((digest for digest in self._lru if digest not in keep), None)
        if victim is None:
            return False
        self._free(victim)
        self.stats.evictions["device"] += 1
        if self.host is None:
            self.stats.evictions["host"] += 1
        logger.info("PEDRO: evicted %s from the device", short(victim))
        return True

    def _free(self, digest: str) -> None:
        span, resident = self._spans.free(digest), self._lru.pop(digest)
        self._evicted.add(digest)
        if self._copies is not None:
            self._copies.freed(span, resident.read)

    def _compact(self) -> None:
        moves = self._spans.compact()
        if self._copies is not None:
            self._copies.begin_moving()
        # By way of a buffer, as a blob's old and new places may overlap.
        buffer = self.arena.new_empty(self.MOVED_BYTES)
        for old, new in moves:
            for at in range(0, old.end - old.begin, self.MOVED_BYTES):
                size = min(self.MOVED_BYTES, old.end - old.begin - at)
                buffer[:size].copy_(self.arena[old.begin + at : old.begin + at + size])
                self.arena[new.begin + at : new.begin + at + size].copy_(buffer[:size])
        if self._copies is not None:
            self._copies.moved()


class _SideStream:
    """Copies of blobs into the arena, on CUDA beside the work of earlier steps."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        # Spans that were given back, and the end of the last step that reads what was there.
        self._freed: list[tuple[Span, Any]] = []

    def freed(self, span: Span, read: Any) -> None:
        """A span was given back."""
        if read is not None:
            self._freed.append((span, read))

    def send(self, blob: Tensor, target: Tensor, span: Span) -> Any:
        """Copy a blob from pinned memory; the event of its end."""
        self._freed = [(other, read) for other, read in self._freed if not read.query()]
        for other, read in self._freed:
            if other.begin < span.end and span.begin < other.end:
                self._stream.wait_event(read)
        with torch.cuda.stream(self._stream):
            target.copy_(blob, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return copied

    def begin_moving(self) -> None:
        """Blobs are about to be moved, by the stream of the steps: it has read what was there."""
        torch.cuda.current_stream().wait_stream(self._stream)

    def moved(self) -> None:
        """They were."""
        self._stream.wait_stream(torch.cuda.current_stream())
        self._freed.clear()
