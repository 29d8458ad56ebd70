"""Engines and the reference for tests: engines live in this process, one at a time."""

from __future__ import annotations

import os

# An engine in the process starts in two seconds; the ones that spawn processes take thirty.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# On a machine that does something else too, waiting threads that spin cost more than they save.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import contextlib
import gc
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from runners import current_runner, stage_as_on_a_device

from vllm_pedro import BackboneShape, PedroConfig, PedroModel
from vllm_pedro.adapter import read_adapter
from vllm_pedro.bench import adapters
from vllm_pedro.bench.adapters import write_pedro
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, Reference, reference_score
from vllm_pedro.serving.blobs import blob_bytes


@contextlib.contextmanager
def start_engine(model: Path | str, pedro: bool = True, **settings: Any) -> Iterator[Any]:
    """An `LLM` in this process, shut down at the end."""
    import vllm_pedro  # noqa: F401  (teaches LLM its keywords)

    # isort: split
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 26,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }
    if pedro:
        arguments |= {"enable_pedro": True, "max_pedros": 4}
    arguments |= settings
    if "speculative_config" in arguments:
        # V2 runs both methods with the same code, but vLLM lets one be asynchronous.
        method = "ngram_gpu" if arguments.get("async_scheduling") else "ngram"
        arguments["speculative_config"] = {"method": method, **arguments["speculative_config"]}
    llm = None
    if not arguments["enforce_eager"]:
        # vLLM's oneDNN handlers run an operator in `__del__`; in the midst of a compilation it
        # leaves torch's dispatch in disorder.
        gc.collect()
    try:
        with _hide_llvmlite(), _no_collections():
            llm = LLM(str(model), **arguments)
        if (
            pedro
            and current_runner() == "v2"
            and arguments["distributed_executor_backend"] == "uni"
        ):
            stage_as_on_a_device(llm)
        yield llm
    finally:
        with _no_collections():
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """vLLM collects garbage ten times as an engine starts and ends: 3 s, and all the rest 0.2 s."""
    with mock.patch.object(gc, "collect", return_value=0):
        yield


@contextlib.contextmanager
def _hide_llvmlite() -> Iterator[None]:
    """vLLM 0.32 looks through all loaded modules when an engine starts and trips over llvmlite's.

    It is loaded by n-gram speculation, so only a second engine in one process meets it.
    """
    hidden = {n: m for n, m in sys.modules.items() if n.startswith("llvmlite.binding")}
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of three small layers, float32, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide enough that greedy tokens depend on everything before them
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_random_adapter(
    model: Path,
    folder: Path,
    seed: int = 0,
    scale: float = 0.1,
    down_scale: float = 1.0,
    **config: Any,
) -> Path:
    """A random adapter for a model; see `write_pedro`.

    As initialised, the down projection makes vectors that hardly depend on the prompt, and a test
    of that dependence would prove nothing.
    """
    config = {"r": 4, "input_norm": "rms", **config}
    shape = BackboneShape.from_pretrained(model)
    return write_pedro(folder, shape, PedroConfig(**config), seed, scale, down_scale)


def write_lora(model: Path, folder: Path, seed: int = 0, scale: float = 0.3) -> Path:
    """A random LoRA adapter of rank 4 on q and v."""
    shape = BackboneShape.from_pretrained(model)
    return adapters.write_lora(folder, shape, seed, scale, 4, ("q_proj", "v_proj"))


class Mismatch(AssertionError):
    """An engine's answer that is not the reference's."""


class Oracle:
    """The reference model with any adapter, loaded when first asked for."""

    def __init__(self, model: Path, keep: int = 1, auto: str = "AutoModelForCausalLM") -> None:
        self._path = model
        self._auto = auto
        self._keep = keep
        self._backbone: Any = None
        self._model_with_adapters: PedroModel | None = None
        self._names: dict[Path, str] = {}  # of adapters that are on the backbone
        self._numbers = itertools.count()

    def adapter_bytes(self, adapter: Path) -> int:
        """What an adapter takes of the device's memory."""
        from transformers import AutoConfig

        shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(self._path))
        stored = read_adapter(adapter)
        return blob_bytes(stored.config, stored.dtype, shape)

    def _model(self, adapter: Path | None) -> Any:
        import transformers

        if self._backbone is None:
            # Not SDPA, which leaves out Gemma 2's soft-capping of attention logits.
            self._backbone = getattr(transformers, self._auto).from_pretrained(
                self._path, dtype=torch.float32, attn_implementation="eager"
            )
        if adapter is None:
            return self._backbone
        if adapter not in self._names:
            name = f"adapter-{next(self._numbers)}"
            if self._model_with_adapters is None:
                made = PedroModel.from_pretrained(self._backbone, adapter, name)
                self._model_with_adapters = made
            else:
                self._model_with_adapters.load_adapter(adapter, name)
            self._names[adapter] = name
            while len(self._names) > self._keep:
                oldest = self._names.pop(next(iter(self._names)))
                self._model_with_adapters.delete_adapter(oldest)
        model = self._model_with_adapters
        assert model is not None
        model.set_adapter(self._names[adapter])
        return model

    def score(
        self,
        prompt: list[int],
        tokens: list[int],
        adapter: Path | None,
        prompt_length: int | None = None,
        images: dict[str, torch.Tensor] | None = None,
    ) -> Reference:
        """The reference's view of a prompt and what an engine continued it with."""
        return reference_score(self._model(adapter), prompt, tokens, prompt_length, images)

    def check_sampled(
        self, output: Any, adapter: Path | None, completion: int, tolerance: float = 5e-4
    ) -> None:
        """A sampled completion's tokens have the log probabilities that the reference gives them.

        Raises:
            Mismatch: They have others.
        """
        chosen = output.outputs[completion]
        tokens = list(chosen.token_ids)
        reference = self.score(list(output.prompt_token_ids), tokens, adapter)
        for step, (token, entry) in enumerate(zip(tokens, chosen.logprobs, strict=True)):
            error = abs(entry[token].logprob - reference.logprobs[step])
            if error > tolerance:
                raise Mismatch(f"token {step}: log probability off by {error:.2e}")

    def check(
        self,
        output: Any,
        adapter: Path | None,
        prompt_length: int | None = None,
        completion: int = 0,
        logprob_tolerance: float = 5e-4,
        images: dict[str, torch.Tensor] | None = None,
    ) -> bool:
        """A greedy `RequestOutput` has the reference's tokens and prompt log probabilities.

        Returns:
            Whether it ran into a near-tie, after which tokens may rightly differ.

        Raises:
            Mismatch: It has others.
        """
        prompt = list(output.prompt_token_ids)
        tokens = list(output.outputs[completion].token_ids)
        if not tokens:
            raise Mismatch("nothing was generated")
        if getattr(output.outputs[completion], "finish_reason", None) == "error":
            raise Mismatch(f"ended with an error after {len(tokens)} tokens")
        reference = self.score(prompt, tokens, adapter, prompt_length, images)
        if output.prompt_logprobs is not None:
            got = [
                entry[token].logprob
                for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
            ]
            worst = max(
                (abs(a - b) for a, b in zip(got, reference.prompt_logprobs, strict=True)),
                default=0.0,
            )
            if worst > logprob_tolerance:
                raise Mismatch(f"prompt logprobs differ by {worst:.2e}, adapter {adapter}")
        for step, (token, best) in enumerate(zip(tokens, reference.greedy, strict=True)):
            if reference.margins[step] < NEAR_TIE_MARGIN:
                return True
            if token != best:
                raise Mismatch(
                    f"token {step} is {token}, not {best} (margin {reference.margins[step]:.4f}), "
                    f"after a prompt of {len(prompt)} tokens, adapter {adapter}"
                )
        return False
