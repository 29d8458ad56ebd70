"""An `LLM` that is stepped by hand, for measurements."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from .import_hook import forget_hooks


class SteppedLLM:
    """An `LLM` with its engine core in this process.

    Args:
        keywords: `LLM`'s.
        with_plugin: Whether vLLM loads this package's plugin.

    Attributes:
        facts: `import_s` and `engine_s` (start-up), `threads`, `kv_blocks` and `kv_block_bytes`;
            with PEDRO `sequence_bytes` (vectors of one sequence), `store_bytes` and `slot_bytes`
            (the largest adapter on the device), the last with LoRA too.
        vocabulary: Number of token ids.
    """

    def __init__(self, keywords: dict[str, Any], with_plugin: bool = True) -> None:
        started = time.perf_counter()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch

        if not with_plugin:
            os.environ["VLLM_PLUGINS"] = ""  # none is loaded
            forget_hooks()
        import vllm
        from vllm import LLM

        imported = time.perf_counter()
        self._llm = LLM(**keywords)
        ready = time.perf_counter()
        if not with_plugin and "vllm_pedro.integration.patches" in sys.modules:
            raise RuntimeError("the engine that is to be vLLM alone has loaded the plugin")
        self.vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        self.facts: dict[str, Any] = {
            "import_s": imported - started,
            "engine_s": ready - imported,
            "vllm": vllm.__version__,
            "threads": torch.get_num_threads(),
            "compiled": not self._llm.llm_engine.model_config.enforce_eager,
            **self._llm.collective_rpc(_worker_memory)[0],
        }

    def adapter(self, kind: str, name: str, number: int, folder: str) -> Any:
        """The request for an adapter.

        Args:
            kind: `pedro` or `lora`.
            name: Its name.
            number: A positive number of its own.
            folder: Its folder.
        """
        if kind == "pedro":
            from .request import PedroRequest

            return PedroRequest(name, number, folder)
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number, folder)

    def add(self, request_id: str, prompt: list[int], max_tokens: int, adapter: Any) -> None:
        """Take in a request for exactly `max_tokens` greedy tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._llm.llm_engine.add_request(
            request_id, {"prompt_token_ids": prompt}, params, lora_request=adapter
        )

    def step(self) -> list[tuple[str, int, bool]]:
        """One step: requests, how many tokens each got, whether it is finished."""
        return [
            (output.request_id, sum(len(c.token_ids) for c in output.outputs), output.finished)
            for output in self._llm.llm_engine.step()
        ]

    def beam_search(
        self, prompts: Sequence[list[int]], width: int, max_tokens: int, adapters: list[Any]
    ) -> None:
        """All prompts at once; vLLM's beam search tells nothing before its end."""
        from vllm.sampling_params import BeamSearchParams

        self._llm.beam_search(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True),
            lora_request=adapters if any(adapters) else None,
        )

    def reset_prefix_cache(self) -> None:
        """Forget what earlier prompts left in the KV cache."""
        self._llm.reset_prefix_cache()

    def peak_bytes(self) -> dict[str, int]:
        """Highest memory use of this process so far: `host`, and `device` on a GPU."""
        import torch

        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["device"] = torch.cuda.max_memory_allocated()
        return peak

    def shutdown(self) -> None:
        """End vLLM's part of the process."""
        self._llm.llm_engine.engine_core.shutdown()


def _worker_memory(worker: Any) -> dict[str, Any]:
    """What the worker has set aside for KV cache and adapters, in bytes."""
    runner = worker.model_runner
    blocks = worker.cache_config.num_gpu_blocks
    kv = sum(t.numel() * t.element_size() for t in _tensors(runner.kv_caches))
    facts: dict[str, Any] = {"kv_blocks": blocks}
    if blocks:
        facts["kv_block_bytes"] = kv // blocks
    pedro = getattr(runner, "pedro", None)
    if pedro is not None:
        rows = pedro.store.vectors[0].shape[0]
        facts["store_bytes"] = pedro.store.nbytes
        facts["sequence_bytes"] = pedro.store.nbytes // rows
        facts["slot_bytes"] = pedro.bank.reader.limits.largest_blob
    loras = [
        tensor
        for module in runner.get_model().modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in _tensors(getattr(module, name, ()))
    ]
    if loras:
        slots = loras[0].shape[0]
        facts["slot_bytes"] = sum(t.numel() * t.element_size() for t in loras) // slots
    return facts


def _tensors(value: Any) -> list[Any]:
    """The tensors in nested tuples and lists."""
    if hasattr(value, "element_size"):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
