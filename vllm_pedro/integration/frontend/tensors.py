"""`POST /v1/load_pedro_tensors`: an adapter in a request's body, for training loops.

Only where vLLM's development switch is on (`VLLM_SERVER_DEV_MODE`).
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from .models import PedroServingModelsMixin

PATH = "/v1/load_pedro_tensors"
"""Below `/v1`, which `--api-key` guards."""


MOST_BODIES = 4
"""Bodies of the largest size whose bytes are held at a time."""


class Bodies:
    """Bodies that are received and loaded: bounded each, and together."""

    def __init__(self) -> None:
        self._held = 0

    @asynccontextmanager
    async def receive(
        self, stream: AsyncIterable[bytes], most: int
    ) -> AsyncIterator[tuple[bytearray | None, int]]:
        """A body, held until the block ends, and its size; None for a body that has no room.

        Args:
            stream: The body in pieces. It is read to its end, or the answer is not heard.
            most: Bytes that one may have.
        """
        body: bytearray | None = bytearray()
        size = own = 0
        try:
            async for piece in stream:
                size += len(piece)
                if body is None:
                    continue
                if size <= most and self._held + len(piece) <= MOST_BODIES * most:
                    body += piece
                    own += len(piece)
                    self._held += len(piece)
                else:
                    body = None
                    self._held -= own
                    own = 0
            yield body, size
        finally:
            self._held -= own


def dev_routes(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `register_vllm_dev_api_routers`, which `VLLM_SERVER_DEV_MODE` calls."""

    def register_vllm_dev_api_routers(app: Any) -> None:
        original(app)
        app.add_api_route(PATH, _make_route(), methods=["POST"])

    return register_vllm_dev_api_routers


def _make_route() -> Callable[..., Any]:
    from fastapi import Request
    from fastapi.responses import JSONResponse, PlainTextResponse
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    bodies = Bodies()

    async def load_pedro_tensors(
        raw_request: Request, lora_name: str, load_inplace: bool = False
    ) -> Any:
        models = raw_request.app.state.openai_serving_models
        if not isinstance(models, PedroServingModelsMixin):
            answer: Any = create_error_response(
                message="PEDRO is not enabled: start the server with --enable-pedro"
            )
        elif models.pedro_api_servers > 1:
            answer = create_error_response(
                message=f"one of {models.pedro_api_servers} API servers would know the adapter: "
                "start the server with --api-server-count 1"
            )
        else:
            most = models.pedro_max_body
            async with bodies.receive(raw_request.stream(), most) as (body, size):
                if body is not None:
                    answer = await models.pedro_load_bytes(lora_name, body, load_inplace)
                elif size > most:
                    answer = create_error_response(
                        message=f"the body has {size} bytes, the largest adapter that this server "
                        f"takes {most} (--max-pedro-rank)"
                    )
                else:
                    answer = create_error_response(
                        message="other bodies are being received: send it again",
                        err_type="ServiceUnavailableError",
                        status_code=HTTPStatus.SERVICE_UNAVAILABLE,
                    )
        if isinstance(answer, ErrorResponse):
            return JSONResponse(answer.model_dump(), status_code=answer.error.code)
        return PlainTextResponse(answer)

    # Annotations are text here, and FastAPI would look for `Request` among the module's names.
    load_pedro_tensors.__annotations__["raw_request"] = Request
    return load_pedro_tensors
