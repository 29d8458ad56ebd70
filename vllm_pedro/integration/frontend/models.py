"""Adapters as models of the OpenAI API: listed, loaded, swapped, unloaded and found on demand.

A name stands for the content that was loaded under it, not for whatever its folder holds later. A
module given at start-up is checked without its weights; they are read when it is first asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ...adapter import memory, repository_of
from ...adapter.header import MAX_HEADER_BYTES
from ...config import PEFT_TYPE, peft_type_of
from ...errors import PedroError
from .. import wire
from ..options import options_of
from ..patches import become
from ..request import PedroRequest, ServedPedroRequest
from .flags import AdapterModules, PedroModulePath
from .folders import check_name, public_reason, resolve_folder
from .metrics import PedroOutputProcessorMixin, metrics_of
from .prompt_length import (
    FIRST_TURN,
    LENGTH_KEY,
    TEXT_KEY,
    WHOLE,
    RefusedRequestError,
    given_prompt,
)
from .registry import (
    AdapterRegistry,
    fetch_config_in_time,
    fetch_in_time,
    read_in_time,
)

logger = logging.getLogger("vllm.vllm_pedro")


class NameLocks:
    """A lock for each name, as long as somebody uses it.

    Upstream keeps one for every name that was ever asked for, whether it existed or not.
    """

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock


_under_way: set[asyncio.Task[Any]] = set()


def to_its_end(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: what was begun is done, even if whoever asked for it goes away meanwhile.

    Given up half-way, the table of names would be ahead of the engines.
    """

    @functools.wraps(method)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        task = asyncio.ensure_future(method(*args, **kwargs))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)
        return await asyncio.shield(task)

    return wrapped


class PedroServingModelsMixin:
    """What vLLM's `OpenAIServingModels` does differently when PEDRO is on.

    `lora_requests` stays vLLM's table of all adapters by name: LoRA's requests, a
    `PedroRequest` for a module whose content was not asked for yet, and a
    `ServedPedroRequest` once it was.
    """

    engine_client: Any
    input_processor: Any
    lora_requests: dict[str, Any]
    lora_id_counter: Any
    lora_resolvers: list[Any]
    lora_resolver_lock: Any
    base_model_paths: list[Any]

    def enable_pedro(self, modules: Any) -> None:
        """Called once, after the original `__init__`."""
        given = isinstance(modules, AdapterModules)
        self.pedro_root: Path | None = modules.root if given else None
        self._pedro_prompt = modules.prompt_length if given else WHOLE
        self._pedro_static: list[PedroModulePath] = modules.pedro if given else []
        self._pedro_registry: AdapterRegistry = self.input_processor.pedro_registry
        self._pedro_starting = False
        self._pedro_before: dict[str, PedroRequest | None] = {}
        self._pedro_metrics = metrics_of(self.engine_client)
        self.lora_resolver_lock = NameLocks()
        # A request whose adapter changed while it waited asks here what its name stands for now.
        self.engine_client.pedro_models = self
        if self._pedro_metrics is not None:
            self._pedro_metrics.is_pedro_name = lambda name: self._pedro_entry(name) is not None
            become(self.engine_client.output_processor, PedroOutputProcessorMixin)

    def _pedro_entry(self, name: str | None) -> Any:
        entry = self.lora_requests.get(name) if name else None
        return entry if isinstance(entry, PedroRequest) else None

    # At start-up.

    async def init_static_loras(self) -> None:
        """Check PEDRO's modules, all of them, before any request; weights are read later.

        Raises:
            ValueError: Names every module that cannot be served.
        """
        start = time.perf_counter()
        folders, wrong = await asyncio.to_thread(self._pedro_inspect)
        if wrong:
            shown = "; ".join(wrong[:10])
            more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"--pedro-modules: {len(wrong)} cannot be served: {shown}{more}")
        for module, folder in zip(self._pedro_static, folders, strict=True):
            self.lora_requests[module.name] = PedroRequest(
                module.name,
                self.lora_id_counter.inc(1),
                folder,
                base_model_name=self._pedro_base(module.base_model_name),
            )
        if self._pedro_static:
            logger.info(
                "PEDRO: checked and registered %d adapters in %.2f s",
                len(self._pedro_static),
                time.perf_counter() - start,
            )
        self._pedro_starting = True
        try:
            await super().init_static_loras()  # type: ignore[misc]
        finally:
            self._pedro_starting = False
        self._pedro_count()

    def _pedro_inspect(self) -> tuple[list[str], list[str]]:
        """Modules' folders, and what is wrong with modules."""
        folders, wrong = [], []
        for module in self._pedro_static:
            try:
                if self.is_base_model(module.name):  # type: ignore[attr-defined]
                    raise PedroError("the name is that of the base model")
                folders.append(self._pedro_registry.locate(module.path))
                self._pedro_registry.inspect(folders[-1])
            except PedroError as error:
                wrong.append(f"{module.name}: {error}")
        return folders, wrong

    # At run time.

    async def show_available_models(self) -> Any:
        """As upstream, except that the answer does not say where PEDRO folders are."""
        models = await super().show_available_models()  # type: ignore[misc]
        for card in models.data:
            if self._pedro_entry(card.id) is not None:
                card.root = card.id
        return models

    @to_its_end
    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        """Load or replace an adapter; a LoRA folder is handed on to vLLM.

        What cannot be loaded is a 400 with the reason, and leaves what the name stood for.
        """
        name, given = request.lora_name, request.lora_path
        if not name or not given:
            return await super().load_lora_adapter(request, base_model_name)  # type: ignore[misc]
        root = None if self._pedro_starting else self.pedro_root
        try:
            if root is None and await asyncio.to_thread(repository_of, given) is not None:
                folder, takes = await self._pedro_fetch(given)
            else:
                folder = resolve_folder(given, root)
                takes = await self._pedro_takes(folder)
            if not takes:
                if root is not None:
                    request = request.model_copy(update={"lora_path": folder})
                answer = await self._load_lora(request, base_model_name)
                self._pedro_count()
                return answer
            check_name(name)
        except PedroError as error:
            return self._pedro_refusal(name, error)
        answer, _ = await self._pedro_load(request, folder, base_model_name)
        return answer

    async def _pedro_load(
        self, request: Any, folder: str, base_model_name: str | None
    ) -> tuple[Any, ServedPedroRequest | None]:
        """What to answer, and what the name stands for; None if it was refused."""
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            refused = await super()._check_load_lora_adapter_request(request)  # type: ignore[misc]
            if refused is not None:
                return refused, None
            try:
                entry = await self._pedro_read(name, folder, base_model_name)
            except PedroError as error:
                return self._pedro_refusal(name, error, folder), None
            await self._pedro_register(entry)
        return f"Success: LoRA adapter '{name}' added successfully.", entry

    @to_its_end
    async def pedro_load_bytes(self, name: str, data: bytes | bytearray, load_inplace: bool) -> Any:
        """Load or replace an adapter that was sent as `adapter.memory.to_bytes` writes it."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        try:
            check_name(name)
            folder = await asyncio.to_thread(memory.hold_bytes, data, "the body")
        except PedroError as error:
            return self._pedro_refusal(name, error)
        entry = None
        try:
            request = LoadLoRAAdapterRequest(
                lora_name=name, lora_path=folder, load_inplace=load_inplace
            )
            answer, entry = await self._pedro_load(request, folder, None)
        finally:
            if entry is None:
                memory.release(folder)
            else:  # kept as long as the name stands for it, or a request has it
                memory.release_with(entry, folder)
        return answer

    @property
    def pedro_api_servers(self) -> int:
        """Processes that answer requests, each with names of its own."""
        return int(self.engine_client.vllm_config.parallel_config._api_process_count)

    @property
    def pedro_max_body(self) -> int:
        """Bytes of the largest adapter that can be sent."""
        return 2 * self._pedro_registry.limits.largest_blob + MAX_HEADER_BYTES

    async def _load_lora(self, request: Any, base_model_name: str | None) -> Any:
        """vLLM's own way; what the name stood for before may be PEDRO's."""
        answer = await super().load_lora_adapter(request, base_model_name)  # type: ignore[misc]
        await self._pedro_replaced(request.lora_name)
        return answer

    # vLLM calls these two when it has the name's lock: only then is it settled what it replaces.

    async def _check_load_lora_adapter_request(self, request: Any) -> Any:
        self._pedro_before[request.lora_name] = self._pedro_entry(request.lora_name)
        return await super()._check_load_lora_adapter_request(request)  # type: ignore[misc]

    async def _check_unload_lora_adapter_request(self, request: Any) -> Any:
        self._pedro_before[request.lora_name] = self._pedro_entry(request.lora_name)
        return await super()._check_unload_lora_adapter_request(request)  # type: ignore[misc]

    async def _pedro_replaced(self, name: str) -> None:
        """Free what vLLM put something else in the place of, or nothing."""
        old = self._pedro_before.pop(name, None)
        if old is not None and self._pedro_entry(name) is not old:
            await self._pedro_release(old)

    async def _pedro_fetch(self, path: str) -> tuple[str, bool]:
        """The folder of a repository of the hub; False if that is LoRA's to load.

        Raises:
            PedroError: It cannot be had.
        """
        if self.engine_client.vllm_config.lora_config is not None:
            from vllm import envs

            if envs.VLLM_USE_MODELSCOPE:
                return path, False
            config = await fetch_config_in_time(path)
            if await asyncio.to_thread(peft_type_of, config) not in (PEFT_TYPE, None):
                return path, False
        return await fetch_in_time(self._pedro_registry, path), True

    async def _pedro_takes(self, folder: str) -> bool:
        """Whether a folder is PEDRO's to load, or to refuse; otherwise it is LoRA's."""
        if self.engine_client.vllm_config.lora_config is None:
            return True
        if not await asyncio.to_thread(os.path.isdir, folder):
            # LoRA takes names of repositories too, but not below a root.
            return self.pedro_root is not None and not self._pedro_starting
        return await asyncio.to_thread(peft_type_of, folder) in (PEFT_TYPE, None)

    @to_its_end
    async def unload_lora_adapter(self, request: Any) -> Any:
        """Unload an adapter: its memory is free once no running request needs it."""
        name = request.lora_name
        if self._pedro_entry(name) is None:
            answer = await super().unload_lora_adapter(request)  # type: ignore[misc]
            await self._pedro_replaced(name)
            self._pedro_count()
            return answer
        async with self.lora_resolver_lock[name]:
            refused = await super()._check_unload_lora_adapter_request(request)  # type: ignore[misc]
            if refused is not None:
                return refused
            old = self.lora_requests.pop(name)
            if isinstance(old, PedroRequest):
                await self._pedro_release(old)
            self._pedro_count()
            logger.info("PEDRO: unloaded adapter %r", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def resolve_lora(self, lora_name: str) -> Any:
        """Find an adapter that nobody loaded: a folder of that name in `--pedro-root`."""
        found = await self._pedro_find(lora_name)
        if found is None and self.lora_resolvers:
            return await super().resolve_lora(lora_name)  # type: ignore[misc]
        if found is None:
            return _error(f"The model `{lora_name[:200]}` does not exist.", HTTPStatus.NOT_FOUND)
        return found

    @to_its_end
    async def _pedro_find(self, name: str) -> Any:
        if self.pedro_root is None:
            return None
        try:
            check_name(name, is_folder=True)
            folder = resolve_folder(name, self.pedro_root)
        except PedroError:
            return None
        if not await asyncio.to_thread(os.path.isdir, folder):
            return None
        if self.lora_resolvers and await asyncio.to_thread(peft_type_of, folder) != PEFT_TYPE:
            return None
        async with self.lora_resolver_lock[name]:
            if name in self.lora_requests:
                return self.lora_requests[name]
            try:
                entry = await self._pedro_read(name, folder)
            except PedroError as error:
                return self._pedro_refusal(name, error, folder)
            await self._pedro_register(entry)
            return entry

    async def pedro_ready(self, request: Any) -> Any:
        """Before a request is answered: read its adapter if nobody asked for it yet.

        Here rather than when the request is processed, since a stream's status is sent before.

        Returns:
            None, or what to answer in the request's place.
        """
        name = request.model
        if self._pedro_entry(name) is None:
            return None
        extra = getattr(request, "vllm_xargs", None) or {}
        try:
            prompt = given_prompt(extra)
        except RefusedRequestError as error:
            return _error(str(error), param=error.parameter)
        if prompt == FIRST_TURN and not hasattr(request, "messages"):
            return _error(f"{LENGTH_KEY} {FIRST_TURN!r} is for chats", param=LENGTH_KEY)
        for key in (LENGTH_KEY, TEXT_KEY):
            if key in extra and getattr(request, "use_beam_search", False):
                # vLLM's beam search takes no extra arguments, so P would be lost without a word.
                return _error(f"{key} cannot be given with use_beam_search", param=key)
        if isinstance(self.lora_requests[name], ServedPedroRequest):
            return None
        async with self.lora_resolver_lock[name]:
            entry = self._pedro_entry(name)
            if entry is None or isinstance(entry, ServedPedroRequest):
                return None
            try:
                read = await self._pedro_read(name, entry.lora_path, entry.base_model_name)
            except PedroError as error:
                return self._pedro_refusal(name, error, entry.lora_path)
            if self.lora_requests.get(name) is entry:
                self.lora_requests[name] = read
        return None

    def pedro_prompt_asked(self, request: Any) -> int | str | None:
        """What P a chat asks for, or the server's default; None without an adapter of PEDRO's."""
        if self._pedro_entry(request.model) is None:
            return None
        extra = request.vllm_xargs or {}
        return given_prompt(extra) or (None if TEXT_KEY in extra else self._pedro_prompt)

    def pedro_current(self, request: ServedPedroRequest) -> ServedPedroRequest:
        """What the name stands for now; for an unloaded one, what was asked for."""
        entry = self.lora_requests.get(request.lora_name)
        return entry if isinstance(entry, ServedPedroRequest) else request

    @to_its_end
    async def pedro_renew(self, old: ServedPedroRequest) -> ServedPedroRequest:
        """What a name stands for now, after its former content failed to load.

        If nobody has replaced it, its folder was changed and the former content has left the
        memory: from here on the name stands for what the folder holds now.

        Raises:
            RefusedRequestError: The name was unloaded, or its folder cannot be served.
        """
        name = old.lora_name
        async with self.lora_resolver_lock[name]:
            entry = self._pedro_entry(name)
            if entry is None:
                raise RefusedRequestError(
                    f"adapter {name!r} was unloaded while the request waited", parameter="model"
                )
            if isinstance(entry, ServedPedroRequest) and entry.digest != old.digest:
                return entry
            try:
                read = await self._pedro_read(name, entry.lora_path, entry.base_model_name)
            except PedroError as error:
                reason = public_reason(error, entry.lora_path)
                logger.warning("PEDRO: adapter %r failed to load: %s", name, error)
                raise RefusedRequestError(
                    f"adapter {name!r}: {reason}", parameter="model"
                ) from None
            if read.digest != old.digest:
                logger.warning(
                    "PEDRO: the files of adapter %r changed without a reload and its former "
                    "content is no longer in memory: serving the new content",
                    name,
                )
                await self._pedro_register(read)
            return read

    # Inside.

    async def _pedro_read(
        self, name: str, folder: str, base_model_name: str | None = None
    ) -> ServedPedroRequest:
        known = await read_in_time(self._pedro_registry, folder)
        old = self.lora_requests.get(name)
        return ServedPedroRequest(
            name,
            old.lora_int_id if old is not None else self.lora_id_counter.inc(1),
            folder,
            base_model_name=self._pedro_base(base_model_name),
            digest=known.digest,
            pools=known.pools,
            nbytes=known.nbytes,
            scope=known.scope,
        )

    def _pedro_base(self, name: str | None) -> str | None:
        """One of the base model's names; anything else is left out, as upstream does."""
        return name if name and self.is_base_model(name) else None  # type: ignore[attr-defined]

    async def _pedro_register(self, entry: ServedPedroRequest) -> None:
        old = self.lora_requests.get(entry.lora_name)
        self.lora_requests[entry.lora_name] = entry
        await wire.restore(self.engine_client, entry.digest)
        if isinstance(old, PedroRequest):
            if getattr(old, "digest", "") != entry.digest:
                await wire.replace(
                    self.engine_client,
                    entry.lora_name,
                    entry.lora_path,
                    entry.digest,
                    entry.pools,
                    entry.nbytes,
                    entry.scope,
                )
            await self._pedro_release(old)
        self._pedro_count()
        logger.info(
            "PEDRO: %s adapter %r (%s) from %s",
            "loaded" if old is None else "replaced",
            entry.lora_name,
            entry.digest[:12],
            entry.lora_path,
        )

    async def _pedro_release(self, old: PedroRequest) -> None:
        """Free what is in memory for an entry, as far as no other name needs it."""
        entries = [e for e in self.lora_requests.values() if isinstance(e, PedroRequest)]
        if all(e.lora_path != old.lora_path for e in entries):
            self._pedro_registry.forget(old.lora_path)
        digest = getattr(old, "digest", "")
        if digest and all(getattr(e, "digest", "") != digest for e in entries):
            for engine, counts in (await wire.retire(self.engine_client, digest)).items():
                if self._pedro_metrics is not None:
                    self._pedro_metrics.observe(counts, engine)

    def _pedro_count(self) -> None:
        if self._pedro_metrics is not None:
            count = sum(isinstance(e, PedroRequest) for e in self.lora_requests.values())
            self._pedro_metrics.set_registered(count)

    def _pedro_refusal(self, name: str, error: PedroError, folder: str | None = None) -> Any:
        # One line, whatever the folder is called.
        reason = " ".join(str(error).split())
        logger.warning("PEDRO: adapter %r cannot be loaded: %s", name[:200], reason)
        return _error(f"adapter {name[:200]!r}: {public_reason(error, folder)}")


def _error(
    message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, param: str | None = "model"
) -> Any:
    from vllm.entrypoints.serve import create_error_response

    kind = "NotFoundError" if status is HTTPStatus.NOT_FOUND else "BadRequestError"
    return create_error_response(message=message, err_type=kind, status_code=status, param=param)


def init(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `OpenAIServingModels`: a switched-on server's table of models becomes PEDRO's."""

    def __init__(
        self: Any, engine_client: Any, *args: Any, lora_modules: Any = None, **kwargs: Any
    ) -> None:
        original(self, engine_client, *args, lora_modules=lora_modules, **kwargs)
        if options_of(getattr(engine_client, "vllm_config", None)) is not None:
            become(self, PedroServingModelsMixin)
            self.enable_pedro(lora_modules)

    return __init__


def check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `BaseServing`: read a request's adapter before the request is answered.

    What is wrong with an adapter would otherwise be found when the request is processed, and then
    the status of a stream has already been sent.
    """

    async def _check_model(self: Any, request: Any) -> Any:
        refused = await original(self, request)
        if refused is None and isinstance(self.models, PedroServingModelsMixin):
            refused = await self.models.pedro_ready(request)
        return refused

    return _check_model


def check_pooling_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `PoolingBaseServing`, which has a check of its own and ignores what it returns."""

    async def _check_model(self: Any, request: Any) -> Any:
        refused = await original(self, request)
        if refused is None and isinstance(self.models, PedroServingModelsMixin):
            refused = await self.models.pedro_ready(request)
            if refused is not None:
                raise RefusedRequestError(refused.error.message, parameter=refused.error.param)
        return refused

    return _check_model


def default_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `BaseServing`: an adapter's name is not a kind of message content.

    Upstream answers a chat for the base model with the adapter that has the name of one, "text" or
    "image". It is meant for a LoRA that a model needs to see.
    """

    def _get_active_default_mm_loras(self: Any, request: Any) -> Any:
        found = original(self, request)
        return None if isinstance(found, PedroRequest) else found

    return _get_active_default_mm_loras


def keep_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `/invocations`: a request without SageMaker's header is for the model it names.

    Upstream takes the model's name from the header alone, and puts nothing in its place where the
    header is missing: the plain model then answers, whatever the request asks for.
    """

    async def transform_request(self: Any, raw_request: Any) -> Any:
        state = raw_request.app.state
        body: Any = None
        if isinstance(getattr(state, "openai_serving_models", None), PedroServingModelsMixin):
            with contextlib.suppress(ValueError):  # the original says what is wrong with it
                body = await raw_request.json()
        asked = body.get("model") if isinstance(body, dict) else None
        result = await original(self, raw_request)
        if asked is not None:
            body = await raw_request.json()
            if body.get("model") is None:
                body["model"] = asked
                raw_request._body = json.dumps(body).encode()
        return result

    return transform_request
