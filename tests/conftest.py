"""Which of vLLM's model runners the engines of a test run use."""

from __future__ import annotations

import signal
import sys

import hypothesis
import pytest
from runners import use_v2

# A busy machine is no failure.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")


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
        use_v2()
    # So that fixtures end the servers and engines they have started.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", returncode=143))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runner") == "v2":
        others = [item for item in items if item.get_closest_marker("both_runners") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_runtest_setup(item: pytest.Item) -> None:
    # vLLM's `register_kernels` reads `vars()` of every attribute of every module, for each engine
    # of the process. llvmlite's library, which n-gram speculation loads, answers any name with a
    # function, `__dict__` too.
    if (ffi := sys.modules.get("llvmlite.binding.ffi")) is not None:
        ffi.lib._fntab["__dict__"] = {}
