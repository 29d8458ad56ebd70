"""The serving flow in one place: adapter -> arena -> plan -> vectors -> row -> scale.

`PedroRuntime.prepare_step` is the method to read first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import PedroError
from ..ops import warm_up
from .adapters import AdapterBank
from .layer import PedroLayer
from .plan import IDENTITY_ROW, Ints, Pending, StepPlan, plan_step
from .rows import Assignment
from .spec import RequestSpec
from .stats import AdapterStats
from .store import VectorStore

logger = logging.getLogger(__name__)


class PedroRuntime:
    """One worker's PEDRO state: who runs with which adapter, and where their vectors are.

    Args:
        bank: Adapters on the device.
        store: The vector store. Which request reads which row is the scheduler's decision.
        failed_anywhere: Where several ranks run the same steps: which of a step's prompts failed on
            some rank, given those that failed on this one. Called in the same steps on all of them.

    Attributes:
        layers: What each decoder layer does with them.
    """

    MAX_RETIRED = 65_536

    def __init__(
        self,
        bank: AdapterBank,
        store: VectorStore,
        failed_anywhere: Callable[[list[bool]], list[bool]] | None = None,
    ) -> None:
        self.bank = bank
        self.store = store
        self._failed_anywhere = failed_anywhere
        self.stats = bank.stats = AdapterStats()
        self.plan = StepPlan()
        self.failed: dict[str, str] = {}
        self._failed_before: frozenset[str] = frozenset()
        self.layers = [
            PedroLayer(vectors, layer, bank.arena, store.token_rows, store.prefills, store.counts)
            for layer, vectors in enumerate(store.vectors)
        ]
        self._specs: dict[str, RequestSpec] = {}
        self._rows: dict[str, int] = {}
        self._pending: dict[str, Pending] = {}
        self._first_scaled: dict[str, int] = {}  # of scope "answer"
        self._reading: set[str] = set()
        self._retired: OrderedDict[str, None] = OrderedDict()
        self._loaded: dict[str, bool] = {}

    def warm_up(self) -> None:
        """Compile and load the operators, so that the first prompt does not wait for it.

        Those that scale are launched in vLLM's profiling run already.
        """
        vectors = max(self.store.vectors, key=lambda vectors: vectors.shape[1])
        hidden = self.store.columns.shape.hidden_size
        warm_up(hidden, vectors.shape[1], vectors.dtype, vectors.device)

    # The life of a request.

    @property
    def has_requests(self) -> bool:
        """Whether any request with an adapter has entered and is not done."""
        return bool(self._specs)

    def admit(self, request_id: str, spec: RequestSpec) -> None:
        """A request with an adapter enters its first step."""
        self._specs[request_id] = spec
        if spec.first_scaled:
            self._first_scaled[request_id] = spec.first_scaled

    def assign(self, assignments: Mapping[str, Assignment]) -> None:
        """Rows for the requests whose first scaled token is in this step, again if preempted."""
        for request_id, assignment in assignments.items():
            spec = self._specs[request_id]
            self._rows[request_id] = assignment.row
            if assignment.must_generate:
                self._pending[request_id] = Pending(
                    spec.digest, spec.pooled_end, spec.scope == "answer"
                )
            else:
                self._pending.pop(request_id, None)
                self.stats.prefills["cached"] += 1

    def finish(self, request_ids: Iterable[str]) -> None:
        """These requests are done or aborted."""
        retired = set()
        for request_id in request_ids:
            spec = self._specs.pop(request_id, None)
            if spec is None:
                continue
            self._rows.pop(request_id, None)
            self._pending.pop(request_id, None)
            self._first_scaled.pop(request_id, None)
            if spec.digest in self._retired:
                retired.add(spec.digest)
        self._drop(retired)

    def row_of(self, request_id: str) -> int:
        """The row of the vector store that a request reads."""
        return self._rows.get(request_id, IDENTITY_ROW)

    # The life of an adapter.

    def prefetch(self, specs: Iterable[RequestSpec]) -> None:
        """Requests for these adapters are queued: have them read beside the batch."""
        for spec in specs:
            if self.bank.prefetch(spec):
                self._loaded[spec.digest] = True

    def take_loaded(self, wait: float = 0.0) -> tuple[dict[str, bool], list[str]]:
        """What became of the adapters, for the scheduler.

        Args:
            wait: Seconds to wait for one that is being read; for a step that does nothing else.

        Returns:
            Digests that were asked for, and whether they could be read; and those that are in
            memory no longer.
        """
        if wait and not self._loaded:
            self.bank.loader.wait(wait)
        loaded = self._loaded | self.bank.collect(keep=self._reading)
        self._loaded = {}
        return loaded, self.bank.take_lost()

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
            stats["resident"] = self.bank.resident
            stats["used_bytes"] = self.bank.used_bytes
        return stats

    # A step.

    def prepare_step(self, request_ids: Sequence[str], lengths: Ints, computed: Ints) -> None:
        """Get ready for one forward pass.

        A request whose adapter fails to load (its folder was changed or removed since the request
        was admitted) is entered in `failed`, and its tokens run as base tokens; the caller ends
        that request with an error and drops what it computed. No other request is touched.

        Args:
            request_ids: The batch in order.
            lengths: `[rows]`, how many of its tokens this step computes; at least 1.
            computed: `[rows]`, how many were computed before, or came from the prefix cache.
        """
        if self._rows:
            get = self._rows.get
            store_rows = [get(request_id, IDENTITY_ROW) for request_id in request_ids]
            first = None
            if self._first_scaled:
                first = [self._first_scaled.get(request_id, 0) for request_id in request_ids]
            self.plan = plan_step(request_ids, store_rows, lengths, computed, self._pending, first)
        else:
            self.plan = StepPlan()
        self.store.load_plan(self.plan, *self._load_adapters())

    def clear_step(self) -> None:
        """Dummy, profiling and capture runs: no vectors are read or generated."""
        self.plan = StepPlan()
        self._reading = set()
        self.store.load_dummy()

    def step_launched(self) -> None:
        """The forward pass of the step was launched."""
        if self._reading:
            self.bank.after_reading(self._reading)

    @property
    def generates_vectors(self) -> bool:
        """Whether this step's forward pass has to run the vector generators."""
        return self.store.has_prefills

    def failed_before(self, request_ids: Iterable[str]) -> None:
        """The requests of the next step that failed on ranks with earlier layers."""
        self._failed_before = frozenset(request_ids)

    def take_failed(self) -> dict[str, str]:
        """Requests whose adapter failed to load, with the reason; empties the record."""
        failed, self.failed = self.failed, {}
        return failed

    # Inside.

    def _load_adapters(self) -> tuple[list[tuple[int, int, int, int]], int]:
        """Bring the step's adapters onto the device.

        Returns:
            The step's prompts, grouped by adapter, and the adapters' highest rank.
        """
        bank, loaded, prefills = self.bank, [], self.plan.prefills
        needed = {prefill.digest for prefill in prefills}
        states, errors = [""] * len(prefills), [""] * len(prefills)
        for i, prefill in enumerate(prefills):
            try:
                states[i] = bank.make_resident(self._specs[prefill.request_id], keep=needed)
            except PedroError as error:
                errors[i] = str(error)
            if prefill.request_id in self._failed_before:
                errors[i] = errors[i] or "a rank with earlier layers could not read the adapter"
        if self._failed_anywhere is not None and prefills:
            for i, failed in enumerate(self._failed_anywhere([bool(e) for e in errors])):
                if failed:
                    errors[i] = errors[i] or "another rank could not read the adapter"
        for prefill, state, reason in zip(prefills, states, errors, strict=True):
            if reason:
                spec = self._specs[prefill.request_id]
                self._fail(prefill.request_id, spec, reason)
                bank.loader.forget_failure(spec)
                continue
            self.stats.prefills[state] += 1
            self._pending.pop(prefill.request_id)
            loaded.append(prefill)
        self._reading = {prefill.digest for prefill in loaded}
        bank.before_reading(self._reading)
        # Only now: the last adapter may have moved the first.
        prompts = [(p.start, p.length, p.row, bank.place_of(p.digest)) for p in loaded]
        prompts.sort(key=lambda prompt: prompt[3])
        return prompts, max(map(bank.rank_of, self._reading), default=0)

    def _drop(self, digests: set[str]) -> None:
        """Free these adapters' memory, except what a request still needs."""
        if digests:
            for digest in digests - {spec.digest for spec in self._specs.values()}:
                self.bank.discard(digest)

    def _fail(self, request_id: str, spec: RequestSpec, reason: str) -> None:
        logger.error("request %s with adapter %r failed: %s", request_id, spec.name, reason)
        self.failed[request_id] = reason
        self.stats.prefills["failed"] += 1
        # Forgotten from here on: what was already scheduled of it runs as base tokens.
        self._pending.pop(request_id)
        row = self._rows.pop(request_id)
        self._specs.pop(request_id)
        self._first_scaled.pop(request_id, None)
        self.plan.store_rows[self.plan.store_rows == row] = IDENTITY_ROW
