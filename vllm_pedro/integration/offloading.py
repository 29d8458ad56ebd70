"""KV blocks that vLLM's connectors move out of the device, and back in.

Those that are served find blocks by vLLM's block hashes, which say of which adapter and prompt they
are, and those before the pooled token in scope "answer" are the backbone's. Two things are left: a
load must not go past the pooled token, whose states generate the vectors, and blocks must not be
stored before their vectors are known to be right. Vectors never travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..serving.spec import RequestSpec

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MultiConnector")
"""Connectors with which requests stay exact."""

_BY_TOKENS = "finds blocks by their tokens alone, so that tenants would read each other's"
_BETWEEN_ENGINES = "hands a prompt's blocks from engine to engine, which was not run"

REFUSED = {
    "DecodeBenchConnector": "fills blocks with made-up values",
    "ExampleConnector": _BY_TOKENS,
    "ExampleHiddenStatesConnector": "writes hidden states, which was not run",
    "FlexKVConnectorV1": "is another project's, which was not read",
    "HF3FSKVConnector": _BY_TOKENS,
    "HiSparseConnector": "is for sparse attention, which was not run",
    "LMCacheConnectorV1": _BY_TOKENS,
    "LMCacheMPConnector": "finds blocks by their tokens and the user's salt alone, so that tenants "
    "would read each other's",
    "MoRIIOConnector": _BETWEEN_ENGINES,
    "MooncakeConnector": _BETWEEN_ENGINES,
    "MooncakeStoreConnector": "needs a store of its own, with which it was not run",
    "NixlConnector": _BETWEEN_ENGINES,
    "NixlPullConnector": _BETWEEN_ENGINES,
    "NixlPushConnector": _BETWEEN_ENGINES,
}
"""The others of vLLM 0.32, and why they are refused."""


def reasons_against(transfer: Any, option: str = "kv_transfer_config") -> Iterator[str]:
    """What stands in the way of a KV connector.

    Args:
        transfer: vLLM's `KVTransferConfig`, or one of a MultiConnector's, a dictionary.
        option: What the user set to have it.
    """
    given = transfer if isinstance(transfer, dict) else vars(transfer)
    name = str(given.get("kv_connector"))
    if given.get("kv_connector_module_path") is not None:
        yield f"KV connector {name} is of a module of its own, which is not known to be exact"
    elif name not in CONNECTORS:
        why = REFUSED.get(name, "is not known to be exact")
        yield f"KV connector {name} {why} (use {' or '.join(CONNECTORS)}, or unset {option})"
    if given.get("kv_load_failure_policy", "fail") != "fail":
        yield "blocks that failed to load must end a request (kv_load_failure_policy: fail)"
    if name == "MultiConnector":
        for child in (given.get("kv_connector_extra_config") or {}).get("connectors", ()):
            yield from reasons_against(child, option)


class Offloading:
    """What the scheduler does with its connector for requests with an adapter.

    Args:
        connector: On the scheduler's side; None: nothing is offloaded.
    """

    def __init__(self, connector: Any) -> None:
        self._held: dict[str, int] = {}
        children = getattr(connector, "sub_connectors", [connector])
        self._connectors = [_KINDS[type(c).__name__](c, self._held) for c in children if c]

    def hold(self, request: Any) -> None:
        """The request has no vectors yet: store its blocks before the first token they scale."""
        if request.pedro is None:
            return
        self._held[request.request_id] = request.pedro.first_scaled
        for connector in self._connectors:
            connector.hold(request.request_id)

    def release(self, request_id: str) -> None:
        """The request's vectors are generated."""
        if self._held.pop(request_id, None) is not None:
            for connector in self._connectors:
                connector.release(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone; what it may store when it ends stays as it is."""
        for connector in self._connectors:
            connector.forget(request_id)
        self._held.pop(request_id, None)


# vLLM has no hooks for limits, which come with a request, from the client. `test_upstream.py` holds
# what is relied upon.


class _Connector:
    """One of them.

    Args:
        connector: vLLM's.
        held: Requests without vectors, and the first token of each that they scale.
    """

    def __init__(self, connector: Any, held: dict[str, int]) -> None:
        self._held = held

    def hold(self, request_id: str) -> None:
        """A request is held from here on."""

    def release(self, request_id: str) -> None:
        """It no longer is."""

    def forget(self, request_id: str) -> None:
        """It is gone."""


class _Offloading(_Connector):
    """vLLM's OffloadingConnector."""

    def __init__(self, connector: Any, held: dict[str, int]) -> None:
        super().__init__(connector, held)
        self._states = connector.connector_scheduler._req_status
        self._given: dict[str, int | None] = {}
        given = connector._max_loadable_tokens

        def max_loadable_tokens(request: Any, num_computed_tokens: int) -> int | None:
            limits = (given(request, num_computed_tokens), loadable(request, num_computed_tokens))
            return min((limit for limit in limits if limit is not None), default=None)

        connector._max_loadable_tokens = max_loadable_tokens

    def hold(self, request_id: str) -> None:
        state = self._states.get(request_id)
        if state is None:
            return
        given = self._given.setdefault(request_id, state.max_offload_tokens)
        # vLLM takes 0 for no limit in one place, and one token never fills a block.
        limit = max(1, self._held[request_id])
        state.max_offload_tokens = limit if given is None else min(given, limit)

    def release(self, request_id: str) -> None:
        state = self._states.get(request_id)
        if state is not None and request_id in self._given:
            state.max_offload_tokens = self._given.pop(request_id)

    def forget(self, request_id: str) -> None:
        self._given.pop(request_id, None)


class _SimpleCPUOffload(_Connector):
    """vLLM's SimpleCPUOffloadConnector: it has no limits of its own, and is asked what is held."""

    def __init__(self, connector: Any, held: dict[str, int]) -> None:
        super().__init__(connector, held)
        manager = connector.scheduler_manager
        if manager is None:  # prefix caching is off, and nothing is moved
            return
        look_up, find = (
            manager.get_num_new_matched_tokens,
            manager.cpu_coordinator.find_longest_cache_hit,
        )
        select = manager._select_eager_blocks_to_store
        limit: int | None = None

        def get_num_new_matched_tokens(request: Any, num_computed_tokens: int) -> Any:
            nonlocal limit
            limit = loadable(request, num_computed_tokens)
            return look_up(request, num_computed_tokens)

        def find_longest_cache_hit(hashes: Any, longest: int, *args: Any, **kwargs: Any) -> Any:
            longest = longest if limit is None else min(longest, limit)
            return find(hashes, longest, *args, **kwargs)

        def select_eager_blocks_to_store(state: Any, block_ids: Any) -> Any:
            first_scaled = held.get(state.request.request_id)
            if first_scaled is not None:
                sizes = zip(block_ids, manager.group_block_sizes, strict=True)
                block_ids = tuple(ids[: first_scaled // size] for ids, size in sizes)
            return select(state, block_ids)

        manager.get_num_new_matched_tokens = get_num_new_matched_tokens
        manager.cpu_coordinator.find_longest_cache_hit = find_longest_cache_hit
        manager._select_eager_blocks_to_store = select_eager_blocks_to_store


_KINDS: dict[str, type[_Connector]] = {
    "OffloadingConnector": _Offloading,
    "SimpleCPUOffloadConnector": _SimpleCPUOffload,
}


def loadable(request: Any, num_computed_tokens: int) -> int | None:
    """Most tokens that may be loaded past the computed ones; None for no limit.

    Vectors that are cached now may be evicted while a load is under way, so this does not count on
    them.
    """
    spec: RequestSpec | None = request.pedro
    if spec is None or spec.is_static:
        return None
    if spec.pools == "all":
        return 0
    return max(0, spec.prompt_length - 1 - num_computed_tokens)
