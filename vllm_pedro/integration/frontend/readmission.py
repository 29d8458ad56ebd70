"""Requests in the front end of `AsyncLLM`: adapters that change while a request waits.

The content of an adapter is fixed when a request is admitted. It can be gone by the time the prompt
is prefilled, if the folder was overwritten meanwhile; then a request that has not begun is admitted
again. (When a name is given other content, the scheduler hands that to the requests that wait.)
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from ...errors import PedroError
from ..request import PedroRequest, ServedPedroRequest
from ..wire import failure_of
from .prompt_length import RefusedRequestError
from .registry import AdapterRegistry, locate_in_time, pedro_request_of

ATTEMPTS = 4


def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `AsyncLLM.generate` and `encode`: admit a request again whose adapter changed before
    its prefill.
    """

    signature = inspect.signature(original)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        call = signature.bind(self, *args, **kwargs)
        lora_request = call.arguments.get("lora_request")

        def start(adapter: Any) -> AsyncGenerator[Any, None]:
            call.arguments["lora_request"] = adapter
            generator: AsyncGenerator[Any, None] = original(*call.args, **call.kwargs)
            return generator

        if not isinstance(lora_request, PedroRequest):
            return start(lora_request)
        registry = getattr(self.input_processor, "pedro_registry", None)
        return _generate(start, lora_request, getattr(self, "pedro_models", None), registry)

    return wrapped


async def _generate(
    start: Callable[[Any], AsyncGenerator[Any, None]],
    adapter: Any,
    models: Any,
    registry: AdapterRegistry | None = None,
) -> AsyncGenerator[Any, None]:
    served = isinstance(adapter, ServedPedroRequest)
    reason = ""
    if not served and registry is not None:
        try:
            adapter = await locate_in_time(registry, adapter)
        except PedroError as error:
            raise RefusedRequestError(
                f"adapter {adapter.lora_name!r}: {error}", parameter="lora_request"
            ) from error
    if served and not adapter.is_pinned:
        # The name may have been given other content since the model was looked up. Nothing is
        # awaited from here until the request is on its way to the scheduler.
        adapter = models.pedro_current(adapter)
    for attempt in range(ATTEMPTS):
        outputs, begun = start(adapter), False
        try:
            async for output in outputs:
                reason = failure_of(output)
                if reason:
                    break
                begun = True
                yield output
            else:
                return
        finally:
            await outputs.aclose()
        if begun or adapter.is_pinned or attempt == ATTEMPTS - 1:
            break
        if served:
            adapter = await models.pedro_renew(adapter)
    if served:
        # The reason may name folders; the worker's log has it.
        reason = "it was changed or removed while the request ran; send the request again"
    raise RefusedRequestError(f"adapter {adapter.lora_name!r}: {reason}", parameter="model")


def beam_search_instance(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `BeamSearchInstance`: offline beams carry the length of the original prompt."""

    def __init__(
        self: Any, prompt: Any, lora_request: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        pedro_request = pedro_request_of(lora_request)
        if pedro_request is not None:
            decoder = prompt if prompt["type"] != "enc_dec" else prompt["decoder_prompt"]
            lora_request = for_beams(pedro_request, len(decoder["prompt_token_ids"]))
        original(self, prompt, lora_request, *args, **kwargs)

    return __init__


def beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `BeamSearchOnlineMixin`: the server has a loop of its own."""

    def wrapped(
        self: Any, prompt: Any, request_id: Any, params: Any, lora_request: Any = None, **kw: Any
    ) -> Any:
        if isinstance(lora_request, PedroRequest) and prompt["type"] == "token":
            lora_request = for_beams(lora_request, len(prompt["prompt_token_ids"]))
        return original(self, prompt, request_id, params, lora_request, **kw)

    return wrapped


def for_beams(request: PedroRequest, length: int) -> PedroRequest:
    """The request of each beam of a search; P is the first prompt's length, unless it says P."""
    pinned: PedroRequest = msgspec.structs.replace(
        request, prompt_length=request.prompt_length or length, is_pinned=True
    )
    return pinned
