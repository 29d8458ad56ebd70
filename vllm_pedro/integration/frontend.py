"""Requests in the front end of ``AsyncLLM``: adapters that change while a request waits.

The content of an adapter is fixed when a request is admitted. It can be gone by the time the prompt
is prefilled, if the folder was overwritten meanwhile; then a request that has not begun is admitted
again. (When a name is given other content, the scheduler hands that to the requests that wait.)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from .patches import wrap
from .processor import RefusedRequestError
from .request import PedroRequest, ServedPedroRequest
from .wire import failure_of

ATTEMPTS = 4


def install_generate() -> None:
    """Admit a request again if its adapter went before its prompt was prefilled.

    Upstream: a request ends with the finish reason ``error``, which the API answers with a 500.
    Can go when: requests can fail with a reason that is the client's, and be put back.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def generate(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(
            self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
        ) -> AsyncGenerator[Any, None]:
            lora_request = kwargs.pop("lora_request", None)

            def start(adapter: Any) -> AsyncGenerator[Any, None]:
                return original(
                    self, prompt, sampling_params, request_id, lora_request=adapter, **kwargs
                )

            if not isinstance(lora_request, PedroRequest):
                return start(lora_request)
            return _generate(start, lora_request, getattr(self, "pedro_models", None))

        return wrapped

    wrap(AsyncLLM, "generate", generate)


async def _generate(
    start: Callable[[Any], AsyncGenerator[Any, None]], adapter: Any, models: Any
) -> AsyncGenerator[Any, None]:
    served = isinstance(adapter, ServedPedroRequest)
    reason = ""
    if served and adapter.prompt_length is None:
        # The name may have been given other content since the model was looked up. Nothing is
        # awaited from here until the request is on its way to the scheduler.
        adapter = models.pedro_current(adapter)
    for attempt in range(ATTEMPTS):
        outputs, begun = start(adapter), False
        try:
            async for output in outputs:
                reason = next(filter(None, map(failure_of, output.outputs)), "")
                if reason:
                    break
                begun = True
                yield output
            else:
                return
        finally:
            await outputs.aclose()
        # The beams of one search must all have one adapter's vectors.
        if begun or adapter.prompt_length is not None or attempt == ATTEMPTS - 1:
            break
        if served:
            adapter = await models.pedro_renew(adapter)
    if served:
        # The reason may name folders; the worker's log has it.
        reason = "it was changed or removed while the request ran; send the request again"
    raise RefusedRequestError(f"adapter {adapter.lora_name!r}: {reason}", parameter="model")


def install_beam_search() -> None:
    """Let the server's beams carry the length of the original prompt, as the offline ones do.

    Upstream: see ``plugin._install_beam_search``; the server has an own loop.
    Can go when: beam search runs inside the engine.
    """
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    def search(original: Callable[..., Any]) -> Callable[..., Any]:
        def beam_search(
            self: Any,
            prompt: Any,
            request_id: Any,
            params: Any,
            lora_request: Any = None,
            **kw: Any,
        ) -> Any:
            if isinstance(lora_request, PedroRequest) and prompt["type"] == "token":
                lora_request = with_prompt_length(lora_request, len(prompt["prompt_token_ids"]))
            return original(self, prompt, request_id, params, lora_request, **kw)

        return beam_search

    wrap(BeamSearchOnlineMixin, "beam_search", search)


def with_prompt_length(request: PedroRequest, length: int) -> PedroRequest:
    """The same request with P, unless it has one."""
    if request.prompt_length is not None:
        return request
    fields = {f: getattr(request, f) for f in request.__struct_fields__}
    return type(request)(**{**fields, "prompt_length": length})
