"""`POST /v1/load_pedro_tensors`: an adapter in a request's body, for training loops.

Only where vLLM's development switch is on (`VLLM_SERVER_DEV_MODE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .models import PedroServingModelsMixin

PATH = "/v1/load_pedro_tensors"
"""Below `/v1`, which `--api-key` guards."""


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
            body, size, most = bytearray(), 0, models.pedro_max_body
            async for piece in raw_request.stream():  # to its end, or the answer is not heard
                size += len(piece)
                if size <= most:
                    body += piece
                else:
                    body.clear()
            if size > most:
                answer = create_error_response(
                    message=f"the body has {size} bytes, the largest adapter that this server "
                    f"takes {most} (--max-pedro-rank)"
                )
            else:
                answer = await models.pedro_load_bytes(lora_name, body, load_inplace)
        if isinstance(answer, ErrorResponse):
            return JSONResponse(answer.model_dump(), status_code=answer.error.code)
        return PlainTextResponse(answer)

    # Annotations are text here, and FastAPI would look for `Request` among the module's names.
    load_pedro_tensors.__annotations__["raw_request"] = Request
    return load_pedro_tensors
