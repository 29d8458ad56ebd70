"""vLLM's model runners: which one the engines of this process and its children use."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

V2_ON_CPU = Path(__file__).parent / "v2_on_cpu"


def use_v2() -> None:
    """Use the V2 runner, on the CPU if need be, here and in processes started from here.

    Raises:
        RuntimeError: vLLM or Triton has been imported already.
    """
    if "triton" in sys.modules or "vllm" in sys.modules:
        raise RuntimeError("vLLM or Triton is imported already: too late to choose the V2 runner")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(V2_ON_CPU), others)))
    runpy.run_path(str(V2_ON_CPU / "sitecustomize.py"))


def current_runner() -> str:
    """Its name: v1 or v2."""
    return "v2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "v1"
