"""The part of `vllm-pedro eval --engine vllm` that runs vLLM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PedroError, first_line
from .llm import start_llm

if TYPE_CHECKING:
    from ..training.data import Example

KV_CACHE_BYTES = 256 << 20
MAX_ROWS = 64


class VllmEngine:
    """A vLLM engine with one adapter, or none, on all rows; see `training.evaluate.Engine`."""

    def __init__(self, llm: Any, adapter: str | None) -> None:
        self._llm = llm
        self._adapter = adapter

    def generate(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
        outputs = self._run(prompts, params, lengths)
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
            [example.prompt_length for example in examples],
        )
        found = []
        for example, output in zip(examples, outputs, strict=True):
            entries = output.prompt_logprobs[len(example.prompt) :]
            pairs = zip(entries, example.completion, strict=True)
            found.append([float(entry[token].logprob) for entry, token in pairs])
        return found

    def _requests(self, lengths: Sequence[int]) -> Any:
        """What each row asks for; None where all ask for the plain model."""
        from .request import PedroRequest

        if self._adapter is None:
            return None
        return [PedroRequest("adapter", 1, self._adapter, prompt_length=n) for n in lengths]

    def _run(self, prompts: Sequence[list[int]], params: Any, lengths: Sequence[Any]) -> Any:
        from vllm.exceptions import VLLMClientError

        requests = self._requests(lengths)
        inputs: Any = [{"prompt_token_ids": tokens} for tokens in prompts]
        try:
            return self._llm.generate(inputs, params, lora_request=requests, use_tqdm=False)
        except (ValueError, VLLMClientError) as error:
            raise PedroError(f"vLLM: {first_line(error)}") from error


@contextlib.contextmanager
def start_engine(
    model: str, adapter: str | None, max_model_len: int, dtype: str = "float32", seed: int = 0
) -> Iterator[VllmEngine]:
    """Start vLLM in this process; when the block ends, nothing of it is left running.

    Args:
        model: The backbone's folder.
        adapter: An adapter folder; None for the plain model.
        max_model_len: Most tokens of a row, prompt and answer.
        dtype: The backbone's.
        seed: vLLM's.

    Raises:
        AdapterError: The folder holds no adapter.
        PedroError: vLLM does not start.
        ModuleNotFoundError: vLLM is not installed.
    """
    with start_llm(
        model,
        None if adapter is None else [adapter],
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=max(4096, max_model_len),
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        seed=seed,
    ) as llm:
        yield VllmEngine(llm, None if adapter is None else os.path.abspath(adapter))
