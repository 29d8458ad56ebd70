"""One vLLM engine in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..adapter import inspect_adapter
from ..errors import PedroError, first_line


def fast_dtype() -> str:
    """What an engine of this machine had better compute in.

    Returns:
        "float32" on x86 CPUs without AVX-512, which only emulate bfloat16; else "auto", vLLM's own
        choice.
    """
    import torch

    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if torch.cuda.is_available() or not is_x86:
        return "auto"
    capability = torch.backends.cpu.get_cpu_capability()
    return "auto" if capability.startswith("AVX512") else "float32"


@contextlib.contextmanager
def start_llm(
    model: str, adapters: Sequence[str] | None = None, verbose: bool = False, **keywords: Any
) -> Iterator[Any]:
    """Start an `LLM` in this process; when the block ends, nothing of it is left running.

    vLLM must not have been imported before, or its log level is the one of that time.

    Args:
        model: The model's folder.
        adapters: Folders of the PEDRO adapters that are to be served together: PEDRO is on, with
            as many in a step, their highest rank and their target modules. None leaves PEDRO off.
        verbose: Leave vLLM's log, warnings and progress bars on.
        **keywords: `LLM`'s, in place of the defaults here: eager, no statistics, seed 0, and the
            dtype that `fast_dtype` names.

    Yields:
        The `LLM`.

    Raises:
        AdapterError: A folder holds no adapter.
        PedroError: vLLM does not start.
        ModuleNotFoundError: vLLM is not installed.
    """
    settings: dict[str, Any] = {
        "enforce_eager": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": verbose,
        "seed": 0,
        "dtype": fast_dtype(),
    }
    if adapters is not None:
        configs = [inspect_adapter(folder) for folder in adapters]
        settings |= {
            "enable_pedro": True,
            "max_pedros": max(1, len(configs)),
            "max_pedro_rank": max([1, *(config.r for config in configs)]),
            "pedro_target_modules": sorted({m for c in configs for m in c.target_modules}),
        }
    # In this process, so that there is no other one to be left behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Logged while vLLM is imported, before its logging reads VLLM_LOGGING_LEVEL.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    from vllm import LLM

    if not verbose:
        # Importing vLLM changes the filters.
        warnings.simplefilter("ignore")
    try:
        llm = LLM(model, **(settings | keywords))
    except PedroError:
        raise
    except Exception as error:
        raise PedroError(f"vLLM did not start: {first_line(error)}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answer(
    llm: Any, questions: Sequence[str], adapters: Sequence[str | None], max_tokens: int
) -> list[Any]:
    """Answer questions greedily, all in one batch; as chats, where the model has a chat template.

    Args:
        llm: An `LLM` with PEDRO on.
        questions: One a row.
        adapters: Each row's adapter folder; None for the plain model.
        max_tokens: Most tokens of an answer.

    Returns:
        vLLM's `CompletionOutput` of each row.

    Raises:
        PedroError: vLLM refuses the batch, such as for a question that is too long.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    from .request import PedroRequest

    known: dict[str, Any] = {
        folder: PedroRequest(folder, number, folder)
        for number, folder in enumerate(dict.fromkeys(filter(None, adapters)), 1)
    }
    requests: Any = [folder and known[folder] for folder in adapters]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    try:
        if getattr(llm.get_tokenizer(), "chat_template", None):
            chats: Any = [[{"role": "user", "content": question}] for question in questions]
            outputs = llm.chat(chats, params, lora_request=requests, use_tqdm=False)
        else:
            outputs = llm.generate(list(questions), params, lora_request=requests, use_tqdm=False)
    except (ValueError, VLLMClientError) as error:
        raise PedroError(f"vLLM: {first_line(error)}") from error
    return [output.outputs[0] for output in outputs]


def describe(llm: Any) -> str:
    """vLLM's version, device, dtype and mode."""
    import vllm
    from vllm.platforms import current_platform

    device = "CPU" if current_platform.is_cpu() else current_platform.get_device_name()
    config = llm.llm_engine.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    if device == "CPU" and fast_dtype() == dtype:
        dtype += ", as this CPU only emulates bfloat16"
    mode = "eager" if config.enforce_eager else "compiled"
    return f"vLLM {vllm.__version__} on {device}, {dtype}, {mode}"
