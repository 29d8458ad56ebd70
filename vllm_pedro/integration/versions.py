"""Which vLLM this package supports: the `vllm` requirement of its extra `cuda`."""

from __future__ import annotations

from importlib import metadata
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

DISTRIBUTION: Final = "vllm-pedro"


def supported_vllm() -> SpecifierSet:
    """The versions of vLLM that this package supports.

    Raises:
        RuntimeError: The package is not installed, or its metadata does not name vLLM.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise RuntimeError(
            f"{DISTRIBUTION} is not installed, so the vLLM versions it supports are not known; "
            f"install it, a checkout too (pip install -e .)"
        ) from None
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if requirement.name == "vllm" and marker and marker.evaluate({"extra": "cuda"}):
            return requirement.specifier
    raise RuntimeError(
        f"the metadata of {DISTRIBUTION} names no supported vLLM; reinstall {DISTRIBUTION}"
    )


def check_vllm_version(found: str) -> None:
    """Refuse a vLLM outside the supported window.

    Args:
        found: vLLM's version. A local part as in `0.32.0+cpu` does not count.

    Raises:
        RuntimeError: Names the version found and the supported window.
    """
    window = supported_vllm()
    try:
        # Pre-releases count as what they are: 0.32.0rc1 comes before 0.32.0.
        supported = window.contains(Version(found), prereleases=True)
    except InvalidVersion:
        supported = False
    if not supported:
        raise RuntimeError(
            f"vllm-pedro supports vLLM {window} and found {found}; "
            f"install a supported one, or set VLLM_PLUGINS to leave vllm_pedro out"
        )
