"""Prefix-cache keys for requests that share a beginning with the backbone: scope "answer"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..serving.spec import cache_key
from .wire import spec_of


def with_answer_key(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `generate_block_hash_extra_keys`: key the block of the first token that is scaled.

    The blocks before it have a base row's hashes; those after it depend on it through the chain.
    Where every token is scaled, the request's salt has the key already.
    """

    def wrapped(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = original(request, start, end, start_mm_idx)
        spec = spec_of(request.sampling_params)
        if spec is not None and spec.scope == "answer" and start <= spec.first_scaled < end:
            keys = (*(keys or ()), ("pedro", cache_key(spec)))
        return keys, next_mm_idx

    return wrapped
