"""The command itself: parsing, messages, and what is handed on to other parsers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from pathlib import Path

import pytest
from commands import error_line

from vllm_pedro import cli
from vllm_pedro.errors import PedroError
from vllm_pedro.integration import serve

# The command itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["bench", "demo", "fetch-model", "init", "inspect", "serve"])
def test_help_names_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert f"    {command} " in capsys.readouterr().out.replace("\n", " \n")


@pytest.mark.parametrize("command", ["fetch-model", "init", "inspect"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: vllm-pedro {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["init", "--r", "x"]])
def test_wrong_arguments_exit_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys\nfrom vllm_pedro import cli\n"
        "try: cli.main(['init', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(cli.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert result.returncode == 0, result.stderr


def test_an_error_of_the_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PedroError("first line\n   second line")

    monkeypatch.setattr("vllm_pedro.fetch.fetch_model", fail)
    assert cli.main(["fetch-model"]) == 2
    assert error_line(capsys) == "vllm-pedro: error: first line second line"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("vllm_pedro.fetch.fetch_model", fail)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["fetch-model"])


# fetch-model -------------------------------------------------------------------------------------


def test_fetch_model_prints_the_folder_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[object, ...]] = []

    def fetch(cache: str | None, progress: bool, verify: bool) -> Path:
        calls.append((cache, progress, verify))
        return Path("/cache/model")

    monkeypatch.setattr("vllm_pedro.fetch.fetch_model", fetch)
    assert cli.main(["fetch-model"]) == 0
    assert capsys.readouterr().out == "/cache/model\n"
    assert cli.main(["fetch-model", "--cache", "/c", "--verify", "--quiet"]) == 0
    assert calls == [(None, True, False), ("/c", False, True)]


# demo and serve ----------------------------------------------------------------------------------


def test_demo_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    demo = types.ModuleType("vllm_pedro.demo")
    demo.main = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_pedro.demo", demo)
    assert cli.main(["demo", "--help", "--port", "1"]) == 0
    assert seen == [["--help", "--port", "1"]]


@pytest.fixture
def vllm_cli(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for vLLM's command line; gathers the arguments it is run with."""
    seen: list[list[str]] = []
    module = types.ModuleType("vllm.entrypoints.cli.main")
    module.main = lambda: seen.append(list(sys.argv))  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.entrypoints", "vllm.entrypoints.cli"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["vllm-pedro", "serve"])
    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)
    return seen


def test_serve_is_vllm_serve(vllm_cli: list[list[str]]) -> None:
    assert cli.main(["serve", "MODEL", "--enable-pedro", "--help"]) == 0
    assert vllm_cli == [["vllm", "serve", "MODEL", "--enable-pedro", "--help"]]


def test_serve_without_vllm_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr(serve, "main", missing)
    assert cli.main(["serve", "MODEL"]) == 2
    assert "pip install 'vllm-pedro[cuda]'" in error_line(capsys)


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(argv: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'xyz'", name="xyz")

    monkeypatch.setattr(serve, "main", missing)
    with pytest.raises(ModuleNotFoundError, match="xyz"):
        cli.main(["serve", "MODEL"])
