"""P, the leading tokens of a prompt that are pooled, in the ways a request may give it.

As a number of tokens; as the text they are of; in a chat, as the prompt of its first turn, so that
every turn has the first one's vectors and finds its KV blocks.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from ...errors import PedroError
from ...files import is_int
from ...training.choices import PROMPT_LENGTHS

logger = logging.getLogger("vllm.vllm_pedro")

LENGTH_KEY = "pedro_prompt_length"
"""Key of `extra_args` (over HTTP: `vllm_xargs`): a number of tokens, or one of `WORDS`."""

TEXT_KEY = "pedro_prompt_text"
"""Key of `extra_args`: the text of the tokens that are pooled."""

WHOLE, FIRST_TURN = WORDS = PROMPT_LENGTHS


class RefusedRequestError(VLLMValidationError, PedroError):
    """A request that cannot be served: a 4xx over HTTP, a `ValueError` offline."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message, parameter=parameter, value=value)  # type: ignore[call-arg]


def given_prompt(extra: Mapping[str, Any] | None) -> int | str | None:
    """What a request's extra arguments say of P: a number, one of `WORDS` or None.

    Raises:
        RefusedRequestError: It is something else, or there is a text beside it.
    """
    extra = extra or {}
    value, text = extra.get(LENGTH_KEY), extra.get(TEXT_KEY)
    if text is not None and (not isinstance(text, str) or not text):
        raise RefusedRequestError(
            f"{TEXT_KEY} must be text, got {str(text)[:40]!r}", parameter=TEXT_KEY
        )
    if text is not None and value is not None:
        raise RefusedRequestError(
            f"{TEXT_KEY} and {LENGTH_KEY} say the same in two ways: give one", parameter=TEXT_KEY
        )
    if value is None or value in WORDS:
        return value
    if is_int(value) and value >= 1:
        return value
    raise RefusedRequestError(
        f"{LENGTH_KEY} must be an integer of at least 1, or {' or '.join(map(repr, WORDS))}, got "
        f"{str(value)[:40]!r}",
        parameter=LENGTH_KEY,
    )


def given_prompt_length(params: Any) -> int | None:
    """P as the extra arguments of a request's parameters give it.

    Raises:
        RefusedRequestError: It is no positive integer, and not "whole".
    """
    value = given_prompt(getattr(params, "extra_args", None))
    if value == FIRST_TURN:
        raise RefusedRequestError(
            f"{LENGTH_KEY} {FIRST_TURN!r} is for a server's chats, where the turns can be told "
            "apart: give a number of tokens",
            parameter=LENGTH_KEY,
        )
    return value if isinstance(value, int) else None


def length_of_text(text: str, tokens: Sequence[int], tokenizer: Any) -> int:
    """How many of a prompt's tokens are a text's.

    Where the text ends within a word, the word's tokens may be others than the prompt's; P ends
    before them.

    Args:
        text: What the prompt begins with.
        tokens: The prompt's.
        tokenizer: The model's.

    Raises:
        RefusedRequestError: The prompt begins with other tokens.
    """
    best = 0
    for special in (True, False):
        own = tokenizer.encode(text, add_special_tokens=special)
        alike = next((i for i, (a, b) in enumerate(zip(own, tokens)) if a != b), None)  # noqa: B905
        alike = min(len(own), len(tokens)) if alike is None else alike
        rest = tokenizer.decode(own[alike:])
        # A token has a byte at least. Both from their beginnings, as the first space may get lost.
        begins = tokenizer.decode(tokens[: alike + len(rest.encode())])
        if len(rest.split()) <= 1 and begins.startswith(tokenizer.decode(own)):
            best = max(best, alike)
    if not best:
        raise RefusedRequestError(
            f"the prompt does not begin with the tokens of {TEXT_KEY} {text[:60]!r}",
            parameter=TEXT_KEY,
        )
    return best


def warn_of_scored_text() -> None:
    """Say once that what is scored is pooled, too."""
    if not _warned:
        _warned.append(True)
        logger.warning(
            "PEDRO: a request asks for its prompt's log probabilities without saying where the "
            "prompt ends: all of it is pooled, a continuation that is scored included. Give %s or "
            "%s.",
            LENGTH_KEY,
            TEXT_KEY,
        )


_warned: list[bool] = []

# Chats.

_said: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("said", default=None)


class PooledPromptHeaders:
    """ASGI middleware that says what of a chat was pooled where `first_turn` was asked for.

    `x-pedro-prompt`: `first_turn` or `whole`; `x-pedro-prompt-length`: P.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        said: dict[str, str] = {}
        _said.set(said)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start" and said:
                own = [(name.encode(), value.encode()) for name, value in said.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def render_chat_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `OpenAIServingChat`: turn "first_turn" into a number of tokens."""

    async def wrapped(self: Any, request: Any) -> Any:
        result = await original(self, request)
        asked = getattr(self.models, "pedro_prompt_asked", None)
        if isinstance(result, tuple) and asked is not None and asked(request) == FIRST_TURN:
            tokens = list(result[1][0]["prompt_token_ids"])
            length = await _first_turn(self, request, tokens)
            extra = {k: v for k, v in (request.vllm_xargs or {}).items() if k != LENGTH_KEY}
            request.vllm_xargs = extra | ({LENGTH_KEY: length} if length else {})
            if (said := _said.get()) is not None:
                said["x-pedro-prompt"] = FIRST_TURN if length else WHOLE
                said["x-pedro-prompt-length"] = str(length or len(tokens))
        return result

    return wrapped


async def _first_turn(serving: Any, request: Any, tokens: list[int]) -> int | None:
    """P of the first request of a conversation, if this one begins with its prompt."""
    messages = request.messages
    roles = [m.get("role") if isinstance(m, dict) else getattr(m, "role", None) for m in messages]
    if "user" not in roles or request.use_beam_search:
        return None
    first = request.model_copy(
        update={
            "messages": messages[: roles.index("user") + 1],
            "add_generation_prompt": True,
            "continue_final_message": False,
        }
    )
    try:
        # Past the cache of images that is kept in step with the engine's: nothing is sent to it.
        result = await serving.online_renderer.render_chat(first, skip_mm_cache=True)
    except Exception:  # a template may raise anything; the whole conversation has been rendered
        return None
    if not isinstance(result, tuple):
        return None
    own = list(result[1][0]["prompt_token_ids"])
    return len(own) if tokens[: len(own)] == own else None
