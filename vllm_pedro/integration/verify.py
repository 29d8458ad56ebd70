"""`vllm-pedro verify`: whether PEDRO works with the vLLM, torch and device at hand, in a minute."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import PedroError, first_line
from .serve import name_the_distribution
from .versions import check_vllm_version, supported_vllm

CONFIGS: tuple[dict[str, Any], ...] = (
    {"pooling": "last"},
    {"pooling": "mean", "activation": "gelu"},
    {"pooling": "max", "activation": "relu", "target_modules": ["v_proj", "k_proj", "gate_proj"]},
    {"r": 0},
    {"scope": "answer"},
)
"""One adapter each; the row after them has none."""

ROWS = 12

TOKENS = 8
"""Generated in each row."""


class Untested(Exception):
    """What was found is neither right nor wrong: nobody has looked at it."""


def main(argv: Sequence[str]) -> int:
    """Check, and print a line for each check.

    Args:
        argv: No more than `--help`.

    Returns:
        0 if all is well, 1 if something is wrong, 3 if something is untested.
    """
    argparse.ArgumentParser(
        prog="vllm-pedro verify",
        description="Check that PEDRO works here: vLLM's version and the functions of vLLM that "
        "are extended, the operators against their reference, and an engine with a small random "
        "model against plain transformers. Ends with 0 if all is well, 1 if something is wrong, "
        "and 3 if this vLLM is untested.",
    ).parse_args(argv)
    name_the_distribution()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("versions", check_versions),
        ("vLLM's functions", check_functions),
        ("operators", check_operators),
        ("engine", check_engine),
    )
    outcomes = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            outcome, text = "ok", check()
        except Untested as error:
            outcome, text = "untested", str(error)
        except Exception as error:
            outcome, text = "WRONG", f"{type(error).__name__}: {first_line(error)}"
        outcomes.append(outcome)
        print(f"{name:17} {outcome:9} {text} ({time.perf_counter() - start:.1f} s)", flush=True)
        if outcome == "untested" and name == "versions":
            print("The rest needs a supported vLLM.")
            check_what_was_read()
            break
    if "WRONG" in outcomes:
        return 1
    return 3 if "untested" in outcomes else 0


def check_versions() -> str:
    """vLLM, torch, transformers and the device."""
    import torch
    import vllm

    found = f"vLLM {vllm.__version__}, torch {torch.__version__}"
    found += f", transformers {metadata.version('transformers')}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        check_vllm_version(vllm.__version__)
    except RuntimeError:
        raise Untested(f"{found}; the supported vLLM is {supported_vllm()}") from None
    return f"{found}, {device}"


def check_what_was_read() -> None:
    """Of an unsupported vLLM: say whether its functions are those that were read at least."""
    try:
        print(f"Its source: {check_functions()}")
    except (Untested, PedroError) as error:
        print(f"Its source: {error}")


def check_functions() -> str:
    """The functions of vLLM that are wrapped, overridden or relied upon."""
    import vllm

    from .upstream import changed, known_digests

    known = known_digests(vllm.__version__)
    if known is None:
        raise Untested("this vLLM's functions were never compared with those that are extended")
    wrong = changed(vllm.__version__)
    if wrong:
        raise PedroError(f"{len(wrong)} of {len(known)} are not those that were read: {wrong[:5]}")
    return f"{len(known)} are those that were read"


def check_operators() -> str:
    """The operators in use, against their reference."""
    import torch

    from .. import ops
    from ..ops import samples

    is_cuda = torch.cuda.is_available()
    count = samples.check(torch.ops.vllm_pedro, "cuda" if is_cuda else "cpu")
    backend = ops.backends.cuda if is_cuda else ops.backends.cpu
    note = f"; {ops.backends.note}" if ops.backends.note else ""
    return f"{backend}: {count} cases equal the reference{note}"


def check_engine() -> str:
    """A batch with adapters of each kind, against plain transformers."""
    import torch
    from vllm import SamplingParams

    from ..adapter import init_adapter, save_adapter
    from ..model import PedroModel
    from ..model.reference import NEAR_TIE_MARGIN, reference_score
    from .llm import start_llm
    from .request import PedroRequest

    with tempfile.TemporaryDirectory() as folder:
        backbone = _make_model(Path(folder, "model"))
        shape = BackboneShape.from_hf_config(backbone.config)
        adapters: list[str | None] = []
        for seed, values in enumerate(CONFIGS):
            adapter = init_adapter(
                PedroConfig(**{"r": 4, "input_norm": "rms", **values}), shape, seed, scale=0.2
            )
            for name, tensor in adapter.tensors.items():
                if name.endswith("down_proj.weight"):
                    tensor *= 15  # so that the vectors depend on the prompt
            adapters.append(f"{folder}/{seed}")
            save_adapter(f"{folder}/{seed}", adapter.config, adapter.tensors)
        adapters.append(None)
        prompts = [
            [(31 * i + 7 * k * k + 3 * k) % 128 for k in range(9 + 7 * i)] for i in range(12)
        ]
        rows = [(prompt, adapters[i % len(adapters)]) for i, prompt in enumerate(prompts)]
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256,
            "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26,
        }  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
        with start_llm(f"{folder}/model", [a for a in adapters if a], **settings) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in rows],
                params,
                lora_request=[
                    path and PedroRequest(Path(path).name, int(Path(path).name) + 1, path)
                    for _, path in rows
                ],
                use_tqdm=False,
            )
        ties = 0
        with torch.device("cpu"):
            for (prompt, path), output in zip(rows, outputs, strict=True):
                model: Any = PedroModel.from_pretrained(backbone, path) if path else backbone
                tokens = list(output.outputs[0].token_ids)
                reference = reference_score(model, prompt, tokens)
                if path:
                    model.unload()
                for step, token in enumerate(tokens):
                    if reference.margins[step] < NEAR_TIE_MARGIN:
                        ties += 1
                        break
                    if token != reference.greedy[step]:
                        raise PedroError(
                            f"token {step} of a row with {path and CONFIGS[int(Path(path).name)]} "
                            f"is {token}, the reference's is {reference.greedy[step]}"
                        )
                if len(tokens) != TOKENS:
                    raise PedroError(f"a row has {len(tokens)} tokens in place of {TOKENS}")
    return f"{len(rows)} rows of {TOKENS} tokens equal plain transformers; near-ties: {ties}"


def _make_model(folder: Path) -> Any:
    """A random Llama of three small layers, float32, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            max_position_embeddings=512, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return model
