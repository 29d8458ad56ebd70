"""The serving flow in one place: adapter -> device slot -> step plan -> vectors -> store -> scale.

:meth:`PedroRuntime.prepare_step` is the method to read first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapter import Adapter
from ..errors import PedroError
from ..generator import generate_vectors, pool_prompt
from .adapters import AdapterBank, HostCache
from .plan import Reader, ScheduledRow, StepPlan, plan_step
from .slots import Assignment
from .spec import RequestSpec
from .stats import AdapterStats
from .vectors import VectorStore

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """The prompts of a step that share an adapter."""

    slot: int
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rows_tensor: torch.Tensor | None = None


class PedroRuntime:
    """One worker's PEDRO state: who runs with which adapter, and where their vectors are.

    Args:
        host: Adapters in host memory.
        bank: Adapters in device slots.
        store: The vector store. Which request reads which row is the scheduler's decision.
    """

    MAX_RETIRED = 65_536

    def __init__(self, host: HostCache, bank: AdapterBank, store: VectorStore) -> None:
        self.host = host
        self.bank = bank
        self.store = store
        self.stats = host.stats = bank.stats = AdapterStats()
        self.plan = StepPlan()
        self.failed: dict[str, str] = {}
        self._specs: dict[str, RequestSpec] = {}
        self._readers: dict[str, Reader] = {}
        self._groups: list[_Group] = []
        self._retired: OrderedDict[str, None] = OrderedDict()

    # The life of a request.

    def admit(self, request_id: str, spec: RequestSpec) -> None:
        """A request with an adapter enters its first step."""
        self._specs[request_id] = spec

    def assign(self, assignments: Mapping[str, Assignment]) -> None:
        """Rows for the requests that enter in this step, or come back after preemption."""
        for request_id, assignment in assignments.items():
            spec = self._specs[request_id]
            self._readers[request_id] = Reader(
                spec.digest, spec.prompt_length, assignment.slot, not assignment.makes
            )
            if not assignment.makes:
                self.stats.prefills["kept"] += 1

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests are done or aborted."""
        retired = set()
        for request_id in request_ids:
            spec = self._specs.pop(request_id, None)
            self._readers.pop(request_id, None)
            if spec is not None and spec.digest in self._retired:
                retired.add(spec.digest)
        self._drop(retired)

    # The life of an adapter.

    def retire(self, digest: str) -> None:
        """The adapter was unloaded or replaced: free its memory once no request needs it.

        A request that was admitted before, and comes to its first step only now, still gets it from
        its folder; the memory is freed again when that request ends.
        """
        self._retired[digest] = None
        while len(self._retired) > self.MAX_RETIRED:
            self._retired.popitem(last=False)
        self._drop({digest})

    def restore(self, digest: str) -> None:
        """The adapter was loaded again."""
        self._retired.pop(digest, None)

    def take_stats(self) -> dict[str, Any]:
        """What happened since it was last asked; empty if nothing did."""
        stats = self.stats.take()
        if stats:
            stats["resident"] = {"device": len(self.bank), "host": len(self.host)}
        return stats

    # A step.

    def prepare_step(self, rows: Sequence[ScheduledRow]) -> None:
        """Get ready for one forward pass over ``rows``, the batch in order.

        A request whose adapter cannot be had (its folder changed or went away since the request was
        admitted) is entered in :attr:`failed`, and its tokens run as base tokens; the caller ends
        that request with an error and drops what it computed. No other row notices.
        """
        if not self._readers:
            self.clear_step()
            return
        self.plan = plan_step(rows, self._readers.get)
        self._make_adapters_resident()
        self.store.load_plan(self.plan)

    def clear_step(self) -> None:
        """Dummy, profiling and capture runs: no row reads or makes vectors."""
        self.plan = StepPlan()
        self._groups = []
        self.store.load_plan(self.plan)

    @property
    def makes_vectors(self) -> bool:
        """Whether this step's forward pass has to run the vector generators."""
        return bool(self._groups)

    @torch.inference_mode()
    def write_vectors(self, layer: int, hidden: torch.Tensor) -> None:
        """Run one layer's generators over the step's prompts and keep their vectors.

        Args:
            layer: Layer index.
            hidden: ``[tokens, d]``, the residual stream before the layer's input norm, over the
                whole flattened batch.
        """
        vectors = self.store.vectors[layer]
        for group in self._groups:
            info = self.bank.info[group.slot]
            assert info is not None
            pooled = self._pool(hidden, group, info.pooling, info.input_norm)
            rank, slot = info.rank, group.slot
            m, n = info.rational_order
            made = generate_vectors(
                pooled,
                self.bank.down[layer][slot, :rank] if rank else None,
                self.bank.up[layer][slot, :, :rank] if rank else None,
                self.bank.bias[layer][slot],
                info.kinds[layer],
                self.bank.numerator[layer][slot, : m + 1],
                self.bank.denominator[layer][slot, :n],
            )
            if group.rows_tensor is None:
                group.rows_tensor = torch.tensor(group.rows, device=vectors.device)
            vectors[group.rows_tensor] = made.to(vectors.dtype)

    def take_failed(self) -> dict[str, str]:
        """Requests whose adapter could not be had, with the reason; empties the record."""
        failed, self.failed = self.failed, {}
        return failed

    # Inside.

    def _make_adapters_resident(self) -> None:
        groups: dict[str, _Group] = {}
        needed = {p.digest for p in self.plan.prefills}
        for prefill in self.plan.prefills:
            spec = self._specs[prefill.request_id]
            group = groups.get(prefill.digest)
            if prefill.digest in self.bank:
                state = "device"
            else:
                state = "host" if prefill.digest in self.host else "disk"
            if group is None:
                try:
                    slot = self.bank.make_resident(prefill.digest, self._getter(spec), keep=needed)
                except PedroError as error:
                    self._fail(prefill.request_id, spec, str(error))
                    continue
                group = groups[prefill.digest] = _Group(slot)
            self.stats.prefills[state] += 1
            group.starts.append(prefill.start)
            group.lengths.append(prefill.length)
            group.rows.append(prefill.slot)
        self._groups = list(groups.values())

    def _drop(self, digests: set[str]) -> None:
        """Free these adapters' memory, except what a request still needs."""
        if digests:
            for digest in digests - {spec.digest for spec in self._specs.values()}:
                self.host.discard(digest)
                self.bank.discard(digest)

    def _getter(self, spec: RequestSpec) -> Callable[[], Adapter]:
        return lambda: self.host.get(spec)

    def _fail(self, request_id: str, spec: RequestSpec, reason: str) -> None:
        logger.error("request %s with adapter %r failed: %s", request_id, spec.name, reason)
        self.failed[request_id] = reason
        self.stats.prefills["failed"] += 1
        # Forgotten from here on: what was already scheduled of it runs as base tokens.
        slot = self._readers.pop(request_id).slot
        self._specs.pop(request_id)
        self.plan.segments = [s for s in self.plan.segments if s.slot != slot]

    @staticmethod
    def _pool(
        hidden: torch.Tensor, group: _Group, pooling: str, input_norm: str | None
    ) -> torch.Tensor:
        """Pooled hidden states ``[rows, d]`` float32 of a group's prompts."""
        if pooling == "last":
            last = [s + n - 1 for s, n in zip(group.starts, group.lengths, strict=True)]
            # As prompts of one token each, all rows in one go.
            states = hidden[torch.tensor(last, device=hidden.device)][:, None]
            return pool_prompt(states, pooling, input_norm)
        return torch.stack(
            [
                pool_prompt(hidden[start : start + length], pooling, input_norm)
                for start, length in zip(group.starts, group.lengths, strict=True)
            ]
        )
