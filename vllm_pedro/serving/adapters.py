"""Adapters in memory: an LRU in host memory, and an LRU of device slots that prefills read."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Array, StoredAdapter, read_adapter, widen
from ..backbone import TARGET_MODULES, BackboneShape
from ..config import PedroConfig
from ..errors import AdapterError
from ..ops.layout import ACTIVATIONS, HEADER, POOLINGS, GeneratorLayout
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
    """

    shape: BackboneShape
    max_rank: int
    modules: tuple[str, ...] = TARGET_MODULES

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

    def check_config(self, config: PedroConfig, source: str) -> None:
        """`check` with an adapter's config."""
        self.check(config.r, config.target_modules, source)


def short(digest: str) -> str:
    """A digest for log lines."""
    return digest[:12]


class HostCache:
    """Adapters in host memory by content digest, least recently used out first.

    Attributes:
        stats: What happens is counted here.
    """

    def __init__(
        self,
        capacity: int,
        limits: AdapterLimits,
        load: Callable[..., StoredAdapter] = read_adapter,
    ) -> None:
        self.capacity = capacity
        self.limits = limits
        self.stats = AdapterStats()
        self._load = load
        self._adapters: OrderedDict[str, StoredAdapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, spec: RequestSpec) -> StoredAdapter:
        """The adapter, from memory or from its folder.

        Raises:
            AdapterError: The folder is gone, broken, or no longer has the content that the request
                was admitted with.
        """
        adapter = self._adapters.get(spec.digest)
        if adapter is None:
            start = time.perf_counter()
            adapter = self._load(
                spec.path,
                self.limits.shape,
                expected_digest=spec.digest,
                check=lambda config: self.limits.check_config(config, spec.path),
            )
            while len(self._adapters) >= self.capacity:
                victim, evicted = self._adapters.popitem(last=False)
                self.stats.evictions["host"] += 1
                logger.info("PEDRO: evicted %s (%s) from host memory", evicted.path, short(victim))
            self._adapters[spec.digest] = adapter
            seconds = time.perf_counter() - start
            self.stats.loaded("host", seconds)
            logger.info(
                "PEDRO: loaded adapter %r (%s) from %s into host memory in %.1f ms",
                spec.name,
                short(spec.digest),
                spec.path,
                1e3 * seconds,
            )
        else:
            self.stats.hits["host"] += 1
        self._adapters.move_to_end(spec.digest)
        return adapter

    def discard(self, digest: str) -> bool:
        """Drop an adapter; whether it was there."""
        adapter = self._adapters.pop(digest, None)
        if adapter is None:
            return False
        self.stats.removals["host"] += 1
        logger.info("PEDRO: removed %s (%s) from host memory", adapter.path, short(digest))
        return True


class AdapterBank:
    """Generator weights on the device: `max_pedros` slots, preallocated, least recently used out.

    Weights are float32 whatever the model's dtype, as the generator is evaluated in float32. The up
    projection has an entry for every column of the vector store; those of modules that an adapter
    does not target are zero with bias one, so that they yield exactly one.

    On CUDA an adapter is packed into pinned memory and copied on a stream of its own, while the
    device works on earlier steps. The copy waits for the last step that read the slot it goes to,
    and the step that reads it waits for the copy; the host waits for neither.

    Attributes:
        capacity: Number of slots.
        generators: Per layer `[slots, record]` float32, see `GeneratorLayout`.
        layout: Where each tensor lies in a record.
        down, up, bias: Per layer, views of `generators`: `[slots, max_rank, d]`,
            `[slots, D, max_rank]`, `[slots, D]`.
    """

    def __init__(
        self,
        slots: int,
        limits: AdapterLimits,
        columns: dict[str, slice],
        device: torch.device,
    ) -> None:
        self.limits = limits
        self.columns = columns
        self.stats = AdapterStats()
        shape = limits.shape
        width = max(c.stop for c in columns.values())
        self.layout = GeneratorLayout(shape.hidden_size, width, limits.max_rank)
        # One allocation, so that an adapter's tensors of many layers are written as one.
        every = self.layout.empty(shape.num_layers * slots, device)
        every = every.view(shape.num_layers, slots, self.layout.record)
        self.generators = list(every)
        views = [self.layout.views(g) for g in self.generators]
        self.down = [v.down for v in views]
        self.up = [v.up for v in views]
        self.bias = [v.bias for v in views]
        self.capacity = slots
        self._lru: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self._copies = _SideStream(slots, self.layout.record, shape.num_layers, device)
        self._on_host = every.numpy() if device.type == "cpu" else None
        # What was last written to a slot, or on CUDA to a staging buffer.
        self._packed: dict[int, tuple[Any, ...]] = {}

    def __len__(self) -> int:
        return len(self._lru)

    def __contains__(self, digest: str) -> bool:
        return digest in self._lru

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for t in self.generators)

    def make_resident(self, digest: str, get: Callable[[], StoredAdapter], keep: set[str]) -> int:
        """Bring an adapter onto the device.

        Args:
            digest: The adapter's content digest.
            get: Gives the adapter if it has to be copied.
            keep: Digests that this step reads and that must not be evicted.

        Returns:
            The adapter's slot.

        Raises:
            AdapterError: From `get`; the bank is as before.
            RuntimeError: All slots are in `keep`; the scheduler admits at most `max_pedros`
                different adapters a step, so this is a defect.
        """
        slot = self._lru.get(digest)
        if slot is None:
            adapter = get()
            start = time.perf_counter()
            slot = self._take_slot(keep)
            self._copy(slot, adapter)
            self._lru[digest] = slot
            self.stats.loaded("device", time.perf_counter() - start)
        else:
            self.stats.hits["device"] += 1
        self._lru.move_to_end(digest)
        return slot

    def discard(self, digest: str) -> bool:
        """Free an adapter's slot; whether it was there."""
        if not self._free_slot_of(digest):
            return False
        self.stats.removals["device"] += 1
        return True

    def _free_slot_of(self, digest: str) -> bool:
        slot = self._lru.pop(digest, None)
        if slot is None:
            return False
        self._free.append(slot)
        return True

    def _take_slot(self, keep: set[str]) -> int:
        if not self._free:
            victim = next((d for d in self._lru if d not in keep), None)
            if victim is None:
                raise RuntimeError(
                    f"one step reads more than the {self.capacity} adapters that fit the device"
                )
            self._free_slot_of(victim)
            self.stats.evictions["device"] += 1
            logger.info("PEDRO: evicted %s from the device", short(victim))
        return self._free.pop()

    def before_reading(self, slots: Iterable[int]) -> None:
        """A step is about to read these slots: let the device wait for copies into them."""
        self._copies.before_reading(slots)

    def after_reading(self, slots: Iterable[int]) -> None:
        """The step that reads these slots was launched: later copies into them wait for it."""
        self._copies.after_reading(slots)

    def _copy(self, slot: int, adapter: StoredAdapter) -> None:
        if self._on_host is not None:
            # Straight into the slot: nothing reads it before the next step.
            self._pack(slot, self._on_host[:, slot], adapter)
            return
        place, staging = self._copies.staging()
        self._pack(place, staging.numpy(), adapter)
        self._copies.send(staging, self.generators, slot)

    def _pack(self, place: int, records: Array, adapter: StoredAdapter) -> None:
        """Write an adapter to `records`, `[layers, record]` float32, over what was there before.

        By NumPy: torch would start its threads for each of hundreds of copies of some kilobytes.
        """
        config, shape, at = adapter.config, self.limits.shape, self.layout
        bias = records[:, at.bias : at.numerator]
        what = (config.r, frozenset(config.target_modules), adapter.values.dtype)
        # What has the same shape is overwritten by the same places. Most of a record may be zeros,
        # when adapters have a lower rank and fewer modules than the layout.
        if self._packed.pop(place, None) != what:
            records.fill(0.0)
            bias.fill(1.0)
        records[:, at.numerator :] = 0.0
        down = records[:, at.down : at.up].reshape(-1, at.max_rank, at.hidden_size)
        up = records[:, at.up : at.bias].reshape(-1, at.max_rank, at.width)  # W_up transposed
        for layers, weights in adapter.blocks():
            start = 0
            for module in config.target_modules:
                here = slice(start, start + shape.widths[module])
                columns = self.columns[module]
                widen(weights.bias[:, here], bias[layers, columns])
                if weights.up is not None:
                    transposed = weights.up[:, here].transpose(0, 2, 1)
                    widen(transposed, up[layers, : config.r, columns])
                start = here.stop
            if weights.down is not None:
                widen(weights.down, down[layers, : config.r])
            for values, place in (
                (weights.numerator, at.numerator),
                (weights.denominator, at.denominator),
            ):
                if values is not None:
                    widen(values, records[layers, place : place + values.shape[1]])
        records[:, :HEADER] = 0.0
        records[:, 0] = [ACTIVATIONS.index(config.activation_of(i)) for i in range(len(records))]
        records[:, 1:6] = (
            config.r,
            *config.rational_order,
            POOLINGS.index(config.pooling),
            config.input_norm is not None,
        )
        self._packed[place] = what


class _SideStream:
    """Copies of adapters into device slots, on CUDA beside the work of earlier steps."""

    STAGES = 2

    def __init__(self, slots: int, record: int, layers: int, device: torch.device) -> None:
        shape = (layers, record)
        self._stream: Any = None
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device)
        self._stages = [
            (place, torch.empty(shape, pin_memory=True), torch.cuda.Event())
            for place in range(self.STAGES)
        ]
        self._copied = [torch.cuda.Event() for _ in range(slots)]
        self._read = [torch.cuda.Event() for _ in range(slots)]

    def staging(self) -> tuple[int, Tensor]:
        """`[layers, record]` in pinned memory to pack an adapter into, and which of them it is."""
        place, packed, sent = self._stages[0]
        sent.synchronize()  # its last copy, two adapters ago
        return place, packed

    def send(self, packed: Tensor, generators: Sequence[Tensor], slot: int) -> None:
        """Copy an adapter into a slot."""
        self._stream.wait_event(self._read[slot])
        with torch.cuda.stream(self._stream):
            for layer, target in enumerate(generators):
                target[slot].copy_(packed[layer], non_blocking=True)
            self._stages[0][2].record()
            self._copied[slot].record()
        self._stages.append(self._stages.pop(0))

    def before_reading(self, slots: Iterable[int]) -> None:
        if self._stream is not None:
            for slot in slots:
                torch.cuda.current_stream().wait_event(self._copied[slot])

    def after_reading(self, slots: Iterable[int]) -> None:
        if self._stream is not None:
            for slot in slots:
                self._read[slot].record()
