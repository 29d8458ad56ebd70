"""vLLM's model runners: which one the engines of this process and its children use."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

V2_ON_CPU = Path(__file__).parent / "v2_on_cpu"


def use_v2() -> None:
    """Use the V2 runner, on the CPU if need be, here and in processes started from here.

    Raises:
        RuntimeError: vLLM or Triton has been imported already.
    """
    if str(V2_ON_CPU) in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return  # this process was started by one that did, and `sitecustomize` has run
    if "triton" in sys.modules or "vllm" in sys.modules:
        raise RuntimeError("vLLM or Triton is imported already: too late to choose the V2 runner")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(V2_ON_CPU), others)))
    runpy.run_path(str(V2_ON_CPU / "sitecustomize.py"))


def current_runner() -> str:
    """Its name: v1 or v2."""
    return "v2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "v1"


@contextlib.contextmanager
def triton_operators() -> Iterator[None]:
    """A GPU's operators in place of the CPU's: the Triton kernels, in the interpreter."""
    import torch

    from vllm_pedro.ops import library, triton_kernels

    replaced = torch.library.Library("vllm_pedro", "IMPL")
    for name in library.SCHEMAS:
        replaced.impl(name, getattr(triton_kernels, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        replaced._destroy()


def stage_as_on_a_device(llm: Any) -> None:
    """Let an engine's vector store take a GPU's way on the CPU: staged copies, launches in dummies.

    Args:
        llm: An `LLM` in this process.
    """
    from vllm_pedro.serving.store import _Stage

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    store = worker.model_runner.pedro.store
    tokens, sequences = len(store.token_rows), len(store.prefills)
    device = store.token_rows.device
    store._stages = [_Stage(tokens, sequences, device) for _ in range(store.STAGES)]
    store.load_dummy()
