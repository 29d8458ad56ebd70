"""The part of ``vllm-pedro demo`` that runs vLLM."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from ..demo import BASE, MAX_MODEL_LEN, Answer, EngineSettings, Request, first_line
from ..errors import PedroError

# Importing vLLM takes seconds; that it is missing can be said before the model is fetched.
if find_spec("vllm") is None:
    raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

# A few dozen rows of a few hundred tokens; vLLM's own default is most of the device's memory.
KV_CACHE_BYTES = 512 << 20


class DemoEngine:
    """One engine with PEDRO on.

    Attributes:
        description: vLLM's version, device and dtype.
    """

    def __init__(self, llm: Any, settings: EngineSettings) -> None:
        import vllm

        from .request import PedroRequest

        self._llm = llm
        self._tokenizer = llm.get_tokenizer()
        self._room = MAX_MODEL_LEN - settings.max_tokens
        self._requests = {
            name: PedroRequest(name, number, adapter.path)
            for number, (name, adapter) in enumerate(settings.adapters.items(), 1)
        }
        config = llm.llm_engine.vllm_config
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        mode = "compiled" if settings.compile else "eager"
        self.description = f"vLLM {vllm.__version__} on {_device_name()}, {dtype}, {mode}"

    def generate(
        self, batch: Sequence[Request], max_tokens: int, ignore_eos: bool = False
    ) -> list[Answer]:
        """Answer a batch greedily, in its order.

        Raises:
            PedroError: a question is too long, or vLLM refuses the batch.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        prompts: Any = [{"prompt_token_ids": self._tokens(row.prompt)} for row in batch]
        requests = [None if row.tenant == BASE else self._requests[row.tenant] for row in batch]
        try:
            outputs = self._llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        except ValueError as error:
            raise PedroError(f"vLLM: {first_line(error)}") from error
        answers = []
        for output in outputs:
            completion = output.outputs[0]
            answers.append(Answer(completion.text.strip(), len(completion.token_ids)))
        return answers

    def _tokens(self, question: str) -> list[int]:
        """A question as the model's chat template puts it; as it is, for a model without one."""
        tokenizer = self._tokenizer
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            tokens = tokenizer.encode(text, add_special_tokens=False)
        else:
            tokens = tokenizer.encode(question)
        if len(tokens) > self._room:
            raise PedroError(
                f"a question has {len(tokens)} tokens; the demo leaves room for {self._room}"
            )
        return list(tokens)


@contextlib.contextmanager
def start_engine(settings: EngineSettings) -> Iterator[DemoEngine]:
    """Start vLLM; when the block ends, however it does, nothing of it is left running.

    Raises:
        PedroError: vLLM does not start.
        ModuleNotFoundError: it is not installed.
    """
    # In this process, so that there is no other one to be left behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    if not settings.verbose:
        # Said while vLLM is imported, before its logging listens to VLLM_LOGGING_LEVEL.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    from vllm import LLM

    if not settings.verbose:
        # Importing vLLM has changed the filters.
        warnings.simplefilter("ignore")
    modules = {module for a in settings.adapters.values() for module in a.config.target_modules}
    keywords: dict[str, Any] = {
        "enable_pedro": True,
        "max_pedros": len(settings.adapters),
        "max_pedro_rank": max(1, *(a.config.r for a in settings.adapters.values())),
        "pedro_target_modules": sorted(modules),
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": settings.rows,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        # A repeated batch would find its prompts there, and the figures would leave them out.
        "enable_prefix_caching": False,
        "enforce_eager": not settings.compile,
        "disable_log_stats": True,
        "use_tqdm_on_load": settings.verbose,
        "seed": 0,
    }
    llm = None
    try:
        try:
            llm = LLM(settings.model, **keywords)
            engine = DemoEngine(llm, settings)
        except PedroError:
            raise
        except Exception as error:
            raise PedroError(
                f"vLLM did not start: {first_line(error)} (--verbose shows more)"
            ) from error
        yield engine
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def _device_name() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "CPU"
    return str(current_platform.get_device_name())
