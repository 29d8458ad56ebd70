"""Which of vLLM's model runners the engines of a test run use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

V2_ON_CPU = Path(__file__).parent / "support" / "v2_on_cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--runner",
        choices=["v1", "v2"],
        default="v1",
        help="vLLM's model runner. v2, a GPU's default, runs on the CPU in Triton's interpreter; "
        "only tests marked both_runners are run then",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--runner") == "v2":
        if "triton" in sys.modules or "vllm" in sys.modules:
            raise pytest.UsageError("--runner v2 comes too late: vLLM or Triton is imported")
        # For this process and for those that tests start.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(V2_ON_CPU), others)))
        exec((V2_ON_CPU / "sitecustomize.py").read_text(), {})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runner") == "v2":
        others = [item for item in items if item.get_closest_marker("both_runners") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
