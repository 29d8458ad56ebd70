"""Where requests come in: find the adapter, fix P, key the cache, refuse what cannot be served."""

from __future__ import annotations

import functools
import hashlib
import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from vllm.utils.async_utils import make_async

from ...config import PEFT_TYPE, peft_type_of
from ...errors import PedroError
from ...serving.adapters import AdapterLimits
from ...serving.spec import RequestSpec
from .. import wire
from ..options import draft_places, options_of, shape_of
from ..patches import become
from ..request import PedroRequest, ServedPedroRequest
from .notes import FolderNotes
from .prompt_length import (
    LENGTH_KEY,
    TEXT_KEY,
    RefusedRequestError,
    given_prompt_length,
    length_of_text,
    warn_of_scored_text,
)
from .registry import AdapterRegistry, KnownAdapter, pedro_request_of


def digest_tokens(tokens: Sequence[int]) -> str:
    """A digest of token ids."""
    return hashlib.sha256(array("q", tokens).tobytes()).hexdigest()


def digest_prompt(tokens: Sequence[int], images: Sequence[Any]) -> str:
    """A digest of a prompt's first tokens.

    Args:
        tokens: Those tokens.
        images: vLLM's features of what else is in the prompt, by its content and place: images of
            one size all have the same tokens.
    """
    digest = digest_tokens(tokens)
    places = sorted(
        (image.mm_position.offset, image.mm_position.length, image.modality, image.identifier)
        for image in images
        if image.mm_position.offset < len(tokens)
    )
    if not places:
        return digest
    return hashlib.sha256(repr((digest, places)).encode()).hexdigest()


def longest_prompt(vllm_config: Any) -> tuple[int, str]:
    """How many tokens one step can take of one prompt, and the option that says so."""
    scheduler = vllm_config.scheduler_config
    limit = scheduler.max_num_batched_tokens - draft_places(vllm_config.speculative_config)
    name = "max_num_batched_tokens"
    if (scheduler.max_num_scheduled_tokens or limit) < limit:
        limit, name = scheduler.max_num_scheduled_tokens, "max_num_scheduled_tokens"
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < limit:
        limit, name = threshold, "long_prefill_token_threshold"
    return limit, name


class PedroInputProcessorMixin:
    """What vLLM's `InputProcessor` does differently when PEDRO is on."""

    vllm_config: Any
    renderer: Any

    def enable_pedro(self) -> None:
        """Called once, after the original `__init__`."""
        options = options_of(self.vllm_config)
        assert options is not None
        shape = shape_of(self.vllm_config)
        limits = AdapterLimits(
            shape,
            options.max_pedro_rank,
            options.pedro_target_modules,
            options.pedro_memory_bytes,
        )
        model = self.vllm_config.model_config
        served = model.served_model_name
        names = [model.model, *([served] if isinstance(served, str) else served or ())]
        notes = FolderNotes(names, lambda: self.renderer.tokenizer)
        self.pedro_registry = AdapterRegistry(limits, notes=notes)
        # The original's was bound before the class changed.
        self.process_inputs_async = make_async(
            self.process_inputs, executor=self.renderer._executor
        )

    def _validate_lora(self, lora_request: Any) -> None:
        if not isinstance(lora_request, PedroRequest):
            super()._validate_lora(lora_request)  # type: ignore[misc]

    def _get_mm_identifier(self, mm_hash: str, lora_request: Any) -> str:
        if isinstance(lora_request, PedroRequest):
            lora_request = None  # what a tower computes does not depend on it
        return str(super()._get_mm_identifier(mm_hash, lora_request))  # type: ignore[misc]

    def process_inputs(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._process_inputs(request_id, prompt, *args, **kwargs)
        except RefusedRequestError:
            # The engine never sees its images: whoever has the same ones has to send them.
            cache = self.renderer.mm_processor_cache
            if cache is not None and isinstance(prompt, dict):
                for mm_hash in itertools.chain(*prompt.get("mm_hashes", {}).values()):
                    cache.invalidate(mm_hash)
            raise

    def _process_inputs(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        supported_tasks: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if wire.carries_spec(params):
            raise RefusedRequestError(
                f"{wire.channel_of(params)}[{wire.KEY!r}] is reserved: ask for a PEDRO adapter "
                "with lora_request=PedroRequest(...), or by its model name",
                parameter=wire.channel_of(params),
            )
        known, length = None, None
        pedro_request = pedro_request_of(lora_request)
        if pedro_request is not None:
            length = given_prompt_length(params)
            self._refuse_what_cannot_be_exact(kwargs)
            path, known = self._find_adapter(pedro_request)
            lora_request = pedro_request
        else:
            for key in (LENGTH_KEY, TEXT_KEY):
                if (getattr(params, "extra_args", None) or {}).get(key) is not None:
                    raise RefusedRequestError(
                        f"{key} is for requests with a PEDRO adapter", parameter=key
                    )
        request = super().process_inputs(  # type: ignore[misc]
            request_id,
            prompt,
            params,
            supported_tasks,
            arrival_time,
            lora_request,
            *args,
            **kwargs,
        )
        if known is not None:
            length = lora_request.prompt_length or length
            text = (getattr(params, "extra_args", None) or {}).get(TEXT_KEY)
            if text is not None and length is None and request.prompt_token_ids is not None:
                tokenizer = self.renderer.get_tokenizer()
                length = length_of_text(text, request.prompt_token_ids, tokenizer)
            if getattr(params, "prompt_logprobs", None) is not None and length is None:
                warn_of_scored_text()
            self._attach(request, lora_request, path, known, length)
        return request

    def _find_adapter(self, lora_request: Any) -> tuple[str, KnownAdapter]:
        if isinstance(lora_request, ServedPedroRequest):
            return lora_request.lora_path, KnownAdapter(
                lora_request.digest,
                lora_request.pools,
                lora_request.nbytes,
                (),
                lora_request.scope,
            )
        try:
            path = self.pedro_registry.locate(lora_request.lora_path)
            return path, self.pedro_registry.lookup(path)
        except PedroError as error:
            raise RefusedRequestError(
                f"adapter {lora_request.lora_name!r}: {error}", parameter="lora_request"
            ) from error

    def _refuse_what_cannot_be_exact(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("resumable"):
            raise RefusedRequestError(
                "a streaming-input session changes its prompt under way, so a PEDRO adapter's "
                "vectors would not be those of the whole prompt: send each turn as a request"
            )

    def _attach(
        self,
        request: Any,
        lora_request: Any,
        path: str,
        known: KnownAdapter,
        prompt_length: int | None,
    ) -> None:
        if request.prompt_embeds is not None or request.prompt_token_ids is None:
            raise RefusedRequestError(
                "PEDRO adapters take prompts of token ids, not prompt embeddings"
            )
        tokens, images = request.prompt_token_ids, request.mm_features or ()
        length = prompt_length or len(tokens)
        if length > len(tokens):
            raise RefusedRequestError(
                f"prompt_length is {length}, but the prompt has only {len(tokens)} tokens",
                parameter="prompt_length",
                value=length,
            )
        for place in (image.mm_position for image in images):
            if place.offset < length < place.offset + place.length:
                raise RefusedRequestError(
                    f"prompt_length is {length}, which is within the image (or the like) in tokens "
                    f"{place.offset} to {place.offset + place.length}: it must end before or after",
                    parameter="prompt_length",
                    value=length,
                )
        limit, option = longest_prompt(self.vllm_config)
        if length > limit and known.scope == "sequence" and known.pools != "none":
            raise RefusedRequestError(
                f"the prompt of {length} tokens is longer than the {limit} that one step takes: a "
                f"PEDRO adapter's vectors need the whole prompt in one step. Shorten it, or start "
                f"the engine with {option} of at least {length}",
                parameter="prompt",
                value=length,
            )
        spec = RequestSpec(
            lora_request.lora_name,
            path,
            known.digest,
            length,
            digest_prompt(tokens[:length], images),
            known.pools,
            lora_request.is_pinned,
            known.nbytes,
            known.scope,
        )
        wire.put_spec(request.params, spec)


def init(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `InputProcessor`: a switched-on engine's understands requests for PEDRO adapters."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if options_of(vllm_config) is not None:
            become(self, PedroInputProcessorMixin)
            self.enable_pedro()

    return __init__


@functools.lru_cache(maxsize=4096)
def _is_pedro_folder(path: str) -> bool:
    return peft_type_of(path) == PEFT_TYPE


def validate_lora(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `InputProcessor`."""

    def _validate_lora(self: Any, lora_request: Any) -> None:
        if isinstance(lora_request, PedroRequest):
            raise RefusedRequestError(
                f"got {lora_request!r}, but PEDRO is not enabled: start the engine with "
                "enable_pedro=True (--enable-pedro)"
            )
        if lora_request is not None and _is_pedro_folder(lora_request.lora_path):
            raise RefusedRequestError(
                f"{lora_request.lora_path} is a PEDRO adapter, but PEDRO is not enabled: start the "
                "engine with enable_pedro=True (--enable-pedro)"
            )
        original(self, lora_request)

    return _validate_lora
