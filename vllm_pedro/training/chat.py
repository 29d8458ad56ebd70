"""Chats: checked, and rendered as serving renders them.

vLLM does not hand a request's messages to the chat template as they come. Text parts are joined, or
all content becomes a list of them, whichever the template reads; a tool call's arguments become an
object; reasoning goes by two names; a tool's definition keeps the keys of OpenAI's. What is pooled
is what comes out of that, so the same is done here, and a form that serving would treat in another
way is refused by its name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..errors import PedroError
from ..files import shorten

Message = dict[str, Any]


class DataError(PedroError):
    """Training or evaluation data that cannot be used; names the file, the line and the fault."""


# Keys with a meaning that serving knows nothing of, or other content than text.
_REFUSED_KEYS: Final = (
    "function_call",
    "weight",
    "thinking",
    "images",
    "audio",
    "refusal",
    "prefix",
)
# What a template's caller, and not the data, decides.
_OWN_ARGUMENTS: Final = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "messages",
    "return_dict",
    "tokenize",
    "tools",
)
_FUNCTION_KEYS: Final = ("name", "description", "parameters", "strict")
_PROBE: Final = "content part 1"


def check_messages(source: str, messages: Any, key: str = "messages") -> list[Message]:
    """Check a list of messages and bring them into one form.

    Args:
        source: file and line, for messages of errors.
        messages: the list, as it came from the data.
        key: where it came from.

    Returns:
        New messages with `role`, `content` (None, a text, or a list of texts), and of `tool_calls`,
        `reasoning`, `tool_call_id`, `name` and `tools` those that are given.

    Raises:
        DataError: names the message and what is wrong with it.
    """
    if not isinstance(messages, list):
        raise DataError(f"{source}: '{key}': expected a list, found {type(messages).__name__}")
    return [
        _check_message(f"{source}: message {number}", message)
        for number, message in enumerate(messages, 1)
    ]


def _check_message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: expected an object, found {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise DataError(f"{where}: 'role': expected text, found {_kind(given, 'role')}")
    for key in _REFUSED_KEYS:
        if key in given:
            raise DataError(f"{where}: '{key}' is not supported: serving does not read it")
    role = given["role"]
    result: Message = {"role": role, "content": _content(where, message)}
    if role == "assistant":
        if given.get("tool_calls"):
            result["tool_calls"] = _tool_calls(where, given["tool_calls"])
        for key in ("reasoning_content", "reasoning"):
            if key in given:
                result["reasoning"] = _text(where, given, key)
    if result["content"] is None and role != "assistant":
        raise DataError(f"{where}: 'content': expected text, found {_kind(message, 'content')}")
    keys = ("name", "tool_call_id") if role == "tool" else ("name",)
    result |= {key: _text(where, given, key) for key in keys if key in given}
    if role == "developer" and "tools" in given:
        result["tools"] = given["tools"]
    return result


def _content(where: str, message: Message) -> str | list[str] | None:
    content = message.get("content")
    if content is None:
        # OpenAI's form beside tool calls.
        if message.get("tool_calls") or message["role"] != "assistant":
            return None
        found = _kind(message, "content")
        raise DataError(f"{where}: 'content': expected text, or 'tool_calls', found {found}")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: 'content': expected text, found {_kind(message, 'content')}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise DataError(
                f"{where}: 'content': expected parts of the type 'text', found "
                f"{kind if isinstance(part, dict) else type(part).__name__!r}"
            )
        texts.append(text)
    return texts


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(f"{where}: 'tool_calls': expected a list, found {type(calls).__name__}")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: 'tool_calls': expected "
                '{"type": "function", "function": {"name": ..., "arguments": {...}}}, '
                f"found {str(call)[:80]}"
            )
        if call.get("type", "function") != "function":
            raise DataError(f"{where}: 'tool_calls': expected type 'function'")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise DataError(f"{where}: 'arguments': invalid JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where}: 'arguments': expected an object, found {type(arguments).__name__}"
            )
        result.append(call | {"function": function | {"arguments": arguments}})
    return result


def check_tools(source: str, tools: Any) -> list[dict[str, Any]] | None:
    """A row's `tools` as serving gives them to the template; None for none.

    Raises:
        DataError: they are not function definitions in OpenAI's form.
    """
    if isinstance(tools, str):  # how a table keeps them
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{source}: 'tools': invalid JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{source}: 'tools': expected a list, found {type(tools).__name__}")
    result = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind != "function" or not isinstance(function, dict) or "name" not in function:
            raise DataError(
                f"{source}: 'tools': expected "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}, '
                f"found {str(tool)[:80]}"
            )
        kept = {key: function.get(key) for key in _FUNCTION_KEYS}
        if kept["strict"] is None:
            del kept["strict"]
        result.append({"type": "function", "function": kept})
    return result


def check_template_options(source: str, options: Any) -> dict[str, Any]:
    """A row's or command's `chat_template_kwargs`.

    Raises:
        DataError: no object, or one with what is not its to say.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise DataError(
            f"{source}: 'chat_template_kwargs': expected an object, found {type(options).__name__}"
        )
    wrong = [key for key in options if key in _OWN_ARGUMENTS]
    if wrong:
        raise DataError(f"{source}: 'chat_template_kwargs': {shorten(wrong)} cannot be given")
    return dict(options)


def render_chat(
    tokenizer: Any,
    source: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """A chat as text, from messages that `check_messages` returned.

    Args:
        tokenizer: the backbone's, with its chat template.
        source: file and line, for messages of errors.
        messages: the messages.
        tools: as `check_tools` returns them.
        options: as `check_template_options` returns them.
        add_generation_prompt: end with what an answer goes on from.

    Raises:
        DataError: there is no template, or it refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{source}: a chat, but the model's tokenizer has no chat template; give 'prompt' and "
            "'completion' as text"
        )
    try:
        template = tokenizer.get_chat_template(tools=tools)
        knows_developer = '"developer"' in template or "'developer'" in template
        if not knows_developer and any(m["role"] == "developer" for m in messages):
            raise DataError(
                f"{source}: role 'developer': the model's chat template does not know it; use "
                "'system'"
            )
        as_parts = _reads_parts(tokenizer, template)
        text = tokenizer.apply_chat_template(
            [_as_served(message, as_parts) for message in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(options or {}),
        )
    except DataError:
        raise
    except Exception as error:  # a template may raise anything; it is a program in the model
        raise DataError(f"{source}: the model's chat template refuses it: {error}") from error
    return str(text)


def _as_served(message: Message, as_parts: bool) -> Message:
    """A message as vLLM hands it to the template (`vllm.renderers.chat_utils`)."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else content or []
    result = dict(message)
    if as_parts and message["role"] != "tool":
        result["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        result["content"] = "\n".join(texts)
    if "reasoning" in message:
        result["reasoning_content"] = message["reasoning"]
    return result


@functools.lru_cache(maxsize=8)
def _reads_parts(tokenizer: Any, template: str) -> bool:
    """Whether the template reads lists of parts; then vLLM gives it nothing else."""

    def part(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text}]

    user = {"role": "user", "content": part(_PROBE)}
    for chat in ([user], [{"role": "system", "content": part("s")}, user]):
        try:
            text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        except Exception:  # as above
            continue
        # A template that does not know lists writes them as they are.
        return _PROBE in text and "'type'" not in text and '"type"' not in text
    return False


def _text(where: str, message: Message, key: str) -> str:
    if not isinstance(message[key], str):
        raise DataError(f"{where}: '{key}': expected text, found {_kind(message, key)}")
    return str(message[key])


def _kind(values: Mapping[str, Any], key: str) -> str:
    return type(values[key]).__name__ if key in values else "no such key"
