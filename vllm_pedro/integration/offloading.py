"""KV blocks that vLLM's OffloadingConnector moves out of the device, and back in.

It finds blocks by vLLM's block hashes, which say of which adapter and prompt they are, and those
before the pooled token in scope "answer" are the backbone's. Two things are left: a load must not
go past the pooled token, whose states generate the vectors, and blocks must not be stored before
their vectors are known to be right.
"""

from __future__ import annotations

from typing import Any

from ..serving.spec import RequestSpec

CONNECTORS = ("OffloadingConnector",)
"""Connectors with which requests stay exact; others find blocks by their tokens alone, or were not
looked into."""


class Offloading:
    """What the scheduler does with the connector for requests with an adapter.

    Args:
        connector: An `OffloadingConnector`, on the scheduler's side; None: nothing is offloaded.
    """

    def __init__(self, connector: Any) -> None:
        self._states: dict[str, Any] = {}
        self._given: dict[str, int | None] = {}
        if connector is None:
            return
        # vLLM has no hook for either: its limits come with a request, from the client.
        # `test_upstream.py` holds what is relied upon.
        self._states = connector.connector_scheduler._req_status
        given = connector._max_loadable_tokens

        def max_loadable_tokens(request: Any, num_computed_tokens: int) -> int | None:
            limits = (given(request, num_computed_tokens), loadable(request, num_computed_tokens))
            return min((limit for limit in limits if limit is not None), default=None)

        connector._max_loadable_tokens = max_loadable_tokens

    def hold(self, request: Any) -> None:
        """The request has no vectors yet: store its blocks before the first token they scale."""
        state = self._states.get(request.request_id)
        if request.pedro is None or state is None:
            return
        given = self._given.setdefault(request.request_id, state.max_offload_tokens)
        # vLLM takes 0 for no limit in one place, and one token never fills a block.
        limit = max(1, request.pedro.first_scaled)
        state.max_offload_tokens = limit if given is None else min(given, limit)

    def release(self, request_id: str) -> None:
        """The request's vectors are generated."""
        state = self._states.get(request_id)
        if state is not None and request_id in self._given:
            state.max_offload_tokens = self._given.pop(request_id)

    def forget(self, request_id: str) -> None:
        """The request is gone; what it may store when it ends stays as it is."""
        self._given.pop(request_id, None)


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
