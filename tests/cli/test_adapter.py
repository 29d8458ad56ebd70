"""`vllm-pedro init` and `inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import Run, error_line

from vllm_pedro import cli
from vllm_pedro.adapter import load_adapter

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


def test_init_writes_what_was_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "new" / "adapter")
    argv = ["init", "--model", model, "--output", path, "--r", "5", "--pooling", "mean"]
    argv += ["--target-modules", "up_proj", "q_proj", "--input-norm", "rms"]
    argv += ["--activation", "relu", "gelu", "rational", "--down-bias"]
    assert cli.main(argv) == 0
    config = load_adapter(path).config
    assert config.base_model_name_or_path == model
    assert config.r == 5
    assert config.pooling == "mean"
    assert config.target_modules == ["up_proj", "q_proj"]
    assert config.input_norm == "rms"
    assert config.down_bias
    assert config.activation == ["relu", "gelu", "rational"]
    # 3 layers of r * (d + D) + D + r, and one layer's 12 coefficients.
    assert "1,947 parameters" in capsys.readouterr().out


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


def test_inspect_shows_what_runs_the_operators(capsys):
    from vllm_pedro.ops import backends

    assert cli.main(["inspect", "--backends"]) == 0
    out = capsys.readouterr().out
    assert backends.cpu in out
    assert "torch" in out
    assert cli.main(["inspect"]) != 0
    assert "needs an adapter folder, or --backends" in capsys.readouterr().err


def test_inspect_layers_and_spread(
    folder: Path, tiny_adapter: Path, dev_file: Path, tmp_path: Path, run: Run
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    status, out, _ = run(
        *("inspect", tiny_adapter, "--model", folder, "--data", dev_file, "--limit", 6),
        *("--layers", "--plot", picture),
    )
    assert status == 0
    assert "vectors over 6 prompts" in out
    first, second = out.splitlines()[:2]
    assert "the prompt makes" in first
    assert second.startswith("loss of 6 rows: ")
    assert "with those of other prompts" in second
    assert [line.split()[:2] for line in out.splitlines() if " relu " in line][-1] == ["1", "relu"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("inspect", tiny_adapter, "--plot", tmp_path / "alone.png")[0] == 0
    assert "--data needs --model" in run("inspect", tiny_adapter, "--data", dev_file)[2]
    assert "cannot write" in run("inspect", tiny_adapter, "--plot", tmp_path / "no" / "p.png")[2]


def test_plot_without_matplotlib_says_what_to_install(
    tiny_adapter: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run("inspect", tiny_adapter, "--plot", tmp_path / "p.png")
    assert status == 2
    assert "vllm-pedro[plot]" in err
