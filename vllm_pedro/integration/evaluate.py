"""The part of ``vllm-pedro eval --engine vllm`` that runs vLLM."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..adapter import load_adapter
from ..errors import PedroError

if TYPE_CHECKING:
    from ..training.data import Example

KV_CACHE_BYTES = 256 << 20
MAX_ROWS = 64


class VllmEngine:
    """A vLLM engine with one adapter, or none, on all rows; see `training.evaluate.Engine`."""

    def __init__(self, llm: Any, adapter: str | None) -> None:
        self._llm = llm
        self._adapter = adapter

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        outputs = self._run(prompts, params, [None] * len(prompts))
        answers = []
        for output in outputs:
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            # With a stop, the token that ended it is the last one.
            answers.append(tokens[:-1] if completion.finish_reason == "stop" else tokens)
        return answers

    def choose(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], allowed: Sequence[list[int]]
    ) -> list[int]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=tokens)
            for tokens in allowed
        ]
        outputs = self._run(prompts, params, lengths)
        return [output.outputs[0].token_ids[0] for output in outputs]

    def completion_logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        from vllm import SamplingParams

        # One token has to be generated; it is thrown away.
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = self._run(
            [example.prompt + example.completion for example in examples],
            params,
            [len(example.prompt) for example in examples],
        )
        found = []
        for example, output in zip(examples, outputs, strict=True):
            entries = output.prompt_logprobs[len(example.prompt) :]
            pairs = zip(entries, example.completion, strict=True)
            found.append([float(entry[token].logprob) for entry, token in pairs])
        return found

    def _run(self, prompts: Sequence[list[int]], params: Any, lengths: Sequence[Any]) -> Any:
        from .request import PedroRequest

        requests: Any = None
        if self._adapter is not None:
            requests = [PedroRequest("adapter", 1, self._adapter, prompt_length=n) for n in lengths]
        inputs: Any = [{"prompt_token_ids": tokens} for tokens in prompts]
        try:
            return self._llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
        except ValueError as error:
            raise PedroError(f"vLLM: {str(error).strip().splitlines()[0]}") from error


@contextlib.contextmanager
def start_engine(
    model: str, adapter: str | None, max_model_len: int, dtype: str = "float32", seed: int = 0
) -> Iterator[VllmEngine]:
    """Start vLLM in this process; when the block ends, nothing of it is left running.

    Args:
        model: the backbone's folder.
        adapter: an adapter folder; None for the plain model.
        max_model_len: most tokens of a row, prompt and answer.
        dtype: the backbone's.
        seed: vLLM's.

    Raises:
        AdapterError: the folder holds no adapter.
        PedroError: vLLM does not start.
        ModuleNotFoundError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    keywords: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": MAX_ROWS,
        "max_num_batched_tokens": max(4096, max_model_len),
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enforce_eager": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": seed,
    }
    if adapter is not None:
        config = load_adapter(adapter).config
        keywords |= {
            "enable_pedro": True,
            "max_pedros": 1,
            "max_pedro_rank": max(1, config.r),
            "pedro_target_modules": sorted(config.target_modules),
        }
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    from vllm import LLM

    warnings.simplefilter("ignore")
    llm: Any = None
    try:
        try:
            llm = LLM(model, **keywords)
        except PedroError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PedroError(f"vLLM did not start: {first}") from error
        yield VllmEngine(llm, None if adapter is None else os.path.abspath(adapter))
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
