"""KV blocks of requests with an adapter: their prefix-cache keys, and what events say of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..serving.spec import cache_key
from .wire import spec_of_request

PER_BLOCK = ("block_hashes", "extra_keys_list", "lookahead_token_ids")
"""Arguments with which events are built that have an entry for each block; the last is 0.33's."""


def with_pedro_key(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `generate_block_hash_extra_keys`: key the block of the first token that is scaled.

    The blocks before it have a base row's hashes; those after it depend on it through the chain.
    The key is tagged, so that no salt of a user and no LoRA's name can be equal to it.
    """

    def wrapped(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = original(request, start, end, start_mm_idx)
        spec = spec_of_request(request)
        if spec is not None and start <= spec.first_scaled < end:
            keys = (*(keys or ()), ("pedro", cache_key(spec)))
        return keys, next_mm_idx

    return wrapped


def with_adapter_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `BlockPool`: events name the adapter of the blocks whose KV depends on it.

    As LoRA's do: in `lora_name`, and first of each block's `extra_keys`. Blocks before the first
    token that is scaled are told of as a base row's, in an event of their own.
    """

    def _build_block_stored_event(self: Any, request: Any, **event: Any) -> Any:
        spec = spec_of_request(request)
        if spec is None:
            return original(self, request, **event)
        hashes, size = event["block_hashes"] or [], event["block_size"]
        start = event["start_token_idx"]
        plain = min(max(0, (spec.first_scaled - start) // size), len(hashes))
        if plain:
            if plain == len(hashes) or event["end_token_idx"] - start != size * len(hashes):
                # All of them; or some are left out, and which token a hash is of is not known.
                return original(self, request, **event)
            middle = start + plain * size
            lists = {k: v for k, v in event.items() if k in PER_BLOCK and v is not None}
            before = {name: values[:plain] for name, values in lists.items()}
            first = original(self, request, **event | before | {"end_token_idx": middle})
            self.kv_event_queue.append(first)
            event |= {name: values[plain:] for name, values in lists.items()}
            event |= {"parent_block_hash": hashes[plain - 1], "start_token_idx": middle}
        event["extra_keys_list"] = [
            (("lora", spec.name), *(keys or ())) for keys in event["extra_keys_list"]
        ]
        stored = original(self, request, **event)
        stored.lora_name = spec.name
        return stored

    return _build_block_stored_event
