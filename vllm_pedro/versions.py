"""Which vLLM this package supports.

The window stands once, in ``pyproject.toml``, as the ``vllm`` requirement of the extra ``cuda``.
It is read from there in a source checkout, and from the metadata of the installed package
otherwise.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

DISTRIBUTION: Final = "vllm-pedro"
EXTRA: Final = "cuda"
REQUIREMENT: Final = "vllm"

_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def supported_vllm() -> SpecifierSet:
    """The versions of vLLM that this package supports.

    Raises:
        RuntimeError: The package's metadata is missing or does not name vLLM.
    """
    for requirement in _requirements_of_extra():
        if requirement.name == REQUIREMENT and requirement.specifier:
            return requirement.specifier
    raise RuntimeError(
        f"the metadata of {DISTRIBUTION} names no supported vLLM; reinstall {DISTRIBUTION}"
    )


def check_vllm_version(found: str) -> None:
    """Refuse a vLLM outside the supported window.

    Args:
        found: vLLM's version. A local part as in ``0.32.0+cpu`` does not count.

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


def _requirements_of_extra() -> list[Requirement]:
    # A checkout comes first: another installed copy must not speak for the code that runs.
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return [Requirement(line) for line in project["optional-dependencies"][EXTRA]]
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise RuntimeError(
            f"{DISTRIBUTION} is not installed and is not a source checkout either, "
            f"so the vLLM versions it supports are not known; install {DISTRIBUTION}"
        ) from None
    requirements = [Requirement(line) for line in lines]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": EXTRA})
        and not requirement.marker.evaluate({"extra": ""})
    ]
