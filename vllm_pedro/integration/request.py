"""`PedroRequest`: what users pass as `lora_request=`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from ..files import is_int

if TYPE_CHECKING:
    import torch

    from ..config import PedroConfig


class PedroRequest(  # type: ignore[call-arg]
    LoRARequest,
    omit_defaults=True,
    array_like=True,
    weakref=True,
):
    """Ask for a PEDRO adapter: `llm.generate(prompts, lora_request=PedroRequest(name, 1, path))`.

    Takes the place of vLLM's `LoRARequest` wherever that is taken, alone or in a list with
    `None` for rows that want the plain backbone.

    Args:
        lora_name: The adapter's name, for logs and outputs.
        lora_int_id: A positive integer, as for LoRA. PEDRO itself tells adapters apart by the
            content of their folders.
        lora_path: The adapter's folder (`adapter_config.json`, `adapter_model.safetensors`), or a
            repository of the Hugging Face hub: `org/name` or `org/name@revision`.
        prompt_length: P, how many leading tokens of the prompt are pooled into the vectors; default
            the whole prompt. A chat's later turns can give the length of the first turn, and so go
            on with its vectors and its cached KV.
        is_pinned: Whether the request is for the content that the folder, or the name, has now. If
            that changes before the request begins, it fails; else it takes the new content. The
            beams of one search are pinned, as all must have one adapter's vectors.
    """

    prompt_length: int | None = None
    is_pinned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.prompt_length
        if length is not None and not (is_int(length) and length >= 1):
            raise ValueError(f"prompt_length must be an integer of at least 1, got {length!r}")

    @classmethod
    def from_tensors(
        cls,
        lora_name: str,
        lora_int_id: int,
        config: PedroConfig,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
        **fields: Any,
    ) -> PedroRequest:
        """A request for an adapter in memory, such as one that is being trained.

        The values are copied, into shared memory that is freed with the request: keep it until the
        answers are there.

        Args:
            lora_name: See the class, as for `lora_int_id` and `fields`.
            lora_int_id: See the class.
            config: The adapter's; `model.pedro_configs["default"]` of a `PedroModel`.
            tensors: By their on-disk names; `model.adapter_tensors()`.
            dtype: The dtype to hand over; None keeps each tensor's own.
            **fields: The class's others.

        Raises:
            PedroError: See `save_adapter`; or there is no room.
        """
        from ..adapter.memory import hold_tensors, release_with

        folder = hold_tensors(config, tensors, dtype)
        request = cls(lora_name, lora_int_id, folder, **fields)
        release_with(request, folder)
        return request


class ServedPedroRequest(  # type: ignore[call-arg]
    PedroRequest,
    omit_defaults=True,
    array_like=True,
):
    """What the server makes of a model name: a request for the content that was loaded under it.

    Args:
        digest: Content digest of the adapter; what the folder holds later does not count.
        pools: Whose states generate its vectors: "last", "all" or "none".
        nbytes: What it takes of the device's memory for adapters.
        scope: Which tokens it scales: "sequence" or "answer".
    """

    digest: str = ""
    pools: str = "last"
    nbytes: int = 0
    scope: str = "sequence"
