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

        imported = time.perf_counter()
        self._llm = vllm.LLM(**keywords)
        ready = time.perf_counter()
        if not with_plugin and "vllm_pedro.integration.patches" in sys.modules:
            raise RuntimeError("the engine that is to be vLLM alone has loaded the plugin")
        self._runs = 0
        self._engine = self._llm.llm_engine
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self.facts: dict[str, Any] = {
            "import_s": imported - started,
            "engine_s": ready - imported,
            "vllm": vllm.__version__,
            "threads": torch.get_num_threads(),
            "compiled": not self._engine.model_config.enforce_eager,
            **self._llm.collective_rpc(_worker_memory)[0],
        }

    def adapter(self, kind: str, name: str, number: int, folder: str) -> Any:
        """The request for a `pedro` or `lora` adapter; `number` is positive and its own."""
        if kind == "pedro":
            from .request import PedroRequest

            return PedroRequest(name, number, folder)
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number, folder)

    def begin(self) -> None:
        """Forget what earlier prompts left in the KV cache; numbers of requests start again."""
        self._llm.reset_prefix_cache()
        self._runs += 1

    def add(self, number: int, prompt: list[int], max_tokens: int, adapter: Any) -> None:
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
        prompts: Any = {"prompt_token_ids": prompt}
        self._engine.add_request(f"{self._runs}-{number}", prompts, params, lora_request=adapter)

    def step(self) -> list[tuple[int, int, bool]]:
        """One step: requests, how many tokens each got, whether it is finished."""
        return [
            (
                int(o.request_id.partition("-")[2]),
                sum(len(c.token_ids) for c in o.outputs),
                o.finished,
            )
            for o in self._engine.step()
        ]

    def beam_search(
        self, prompts: Sequence[list[int]], adapters: list[Any], width: int, max_tokens: int
    ) -> None:
        """All prompts at once; vLLM's beam search tells nothing before its end."""
        from vllm.sampling_params import BeamSearchParams

        self._llm.beam_search(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=True),
            lora_request=adapters if any(adapters) else None,
        )

    def peak_bytes(self) -> dict[str, int]:
        """Highest memory use of this process so far: `host`, and `device` on a GPU."""
        import torch

        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["device"] = torch.cuda.max_memory_allocated()
        return peak

    def shutdown(self) -> None:
        """End vLLM's part of the process."""
        self._engine.engine_core.shutdown()


def _worker_memory(worker: Any) -> dict[str, Any]:
    """What the worker has set aside for KV cache and adapters, in bytes."""
    from torch.utils._pytree import tree_leaves

    runner = worker.model_runner
    blocks = worker.cache_config.num_gpu_blocks
    facts: dict[str, Any] = {"kv_blocks": blocks}
    if blocks:
        facts["kv_block_bytes"] = sum(t.nbytes for t in tree_leaves(runner.kv_caches)) // blocks
    pedro = getattr(runner, "pedro", None)
    if pedro is not None:
        facts["store_bytes"] = pedro.store.nbytes
        facts["sequence_bytes"] = pedro.store.nbytes // pedro.store.vectors[0].shape[0]
        facts["slot_bytes"] = pedro.bank.reader.limits.largest_blob
    loras = [
        tensor
        for module in runner.get_model().modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in tree_leaves(getattr(module, name, ()))
    ]
    if loras:
        facts["slot_bytes"] = sum(t.nbytes for t in loras) // loras[0].shape[0]
    return facts
