"""`vllm serve`'s flags."""

from __future__ import annotations

import argparse
import json
import pickle

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_pedro.errors import PedroError
from vllm_pedro.integration.frontend.flags import (
    AdapterModules,
    PedroModulePath,
    apply_flags,
    parse_modules,
)


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    return make_arg_parser(FlexibleArgumentParser())


def test_the_flags_are_in_the_help(parser):
    text = parser.format_help()
    assert "PedroConfig" in text
    flags = ["--enable-pedro", "--pedro-modules", "--max-pedros", "--max-cpu-pedros"]
    flags += ["--pedro-memory-bytes", "--max-pedro-rank", "--pedro-target-modules", "--pedro-root"]
    whole = argparse.ArgumentParser.format_help(parser)
    for flag in flags:
        assert flag in text, "the short help names it"
        assert f"{flag}" in whole
    assert "(default: None)" not in whole[whole.index("PedroConfig") :].partition("\n\n\n")[0]


def test_both_forms_of_modules():
    assert parse_modules(["a=/x/y", "b=rel=ative,z"]) == [
        PedroModulePath("a", "/x/y"),
        PedroModulePath("b", "rel=ative,z"),
    ]
    one = json.dumps({"name": "c", "path": "/c", "base_model_name": "base"})
    many = json.dumps([{"name": "d", "path": "/d"}, {"name": "e", "path": "/e"}])
    assert parse_modules([one, many]) == [
        PedroModulePath("c", "/c", "base"),
        PedroModulePath("d", "/d"),
        PedroModulePath("e", "/e"),
    ]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["name"], "expected name=path"),
        (["=x"], "1 to 200 characters"),
        (["a="], "path is empty"),
        (["a/../b=x"], "separators"),
        (["{"], "invalid JSON"),
        (['{"name": "x"}'], "strings name and path"),
        (['{"name": "x", "path": 1}'], "strings name and path"),
        (['{"name": "x", "path": "y", "more": "z"}'], "strings name and path"),
        (["[1]"], "strings name and path"),
        (["a=x", "b=y", "a=z"], "given twice: a"),
    ],
)
def test_modules_that_are_refused(items, message):
    with pytest.raises(PedroError, match=message):
        parse_modules(items)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work where there are folders a, b and c that look like adapters."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


def test_flags_reach_engine_and_front_end(parser, tmp_path, tiny, here):
    (tmp_path / "link").symlink_to(tmp_path)
    flags = ["--enable-pedro", "--pedro-modules", "a=a", "b=b", "--max-pedros", "3"]
    flags += ["--pedro-memory-bytes", "1G"]
    flags += ["--pedro-target-modules", "v_proj", "q_proj", "--pedro-root", f"{tmp_path}/link"]
    flags += ["--lora-modules", "l=/l", "--pedro-modules", "c=c"]
    flags += ["--additional-config", '{"mine": 1}']
    args = parser.parse_args(["--model", str(tiny), *flags])
    for _ in range(2):  # each API server process reads the same arguments again
        engine = AsyncEngineArgs.from_cli_args(args)
        assert engine.additional_config == {
            "mine": 1,
            "pedro": {
                "max_pedros": 3,
                "max_cpu_pedros": None,
                "max_pedro_rank": 32,
                "pedro_target_modules": ["q_proj", "v_proj"],
                "pedro_memory_bytes": 1 << 30,
            },
        }
        args = pickle.loads(pickle.dumps(args))
    assert isinstance(args.lora_modules, AdapterModules)
    assert [m.name for m in args.lora_modules] == ["l"]
    assert [m.name for m in args.lora_modules.pedro] == ["a", "b", "c"]
    assert args.lora_modules.root == tmp_path.resolve()


def test_a_config_file_works_too(parser, tmp_path, tiny, here):
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"model: {tiny}\nenable-pedro: true\npedro-modules:\n  - a=a\n  - b=b\nmax-pedros: 5\n"
    )
    args = parser.parse_args(["serve", "--config", str(file)])
    AsyncEngineArgs.from_cli_args(args)
    assert args.additional_config["pedro"]["max_pedros"] == 5
    assert [m.name for m in args.lora_modules.pedro] == ["a", "b"]


def test_modules_say_what_is_scaled_where_no_others_can_be_loaded(
    parser, tmp_path, monkeypatch, tiny, write_adapter
):
    switches = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE")
    for switch in switches:
        monkeypatch.delenv(switch, raising=False)
    flags = ["--model", str(tiny), "--enable-pedro", "--pedro-modules"]
    for name, targets in (("a", ["v_proj", "q_proj"]), ("b", ["v_proj", "up_proj"])):
        write_adapter(tiny, folder=tmp_path / name, target_modules=targets)
        flags.append(f"{name}={tmp_path / name}")

    def targets(*more):
        args = parser.parse_args([*flags, *more])
        apply_flags(args)
        return args.additional_config["pedro"]["pedro_target_modules"]

    assert targets() == ["q_proj", "v_proj", "up_proj"]
    assert targets("--pedro-target-modules", "v_proj") == ["v_proj"]
    assert len(targets("--pedro-modules", "c=org/repo")) == 5
    for switch in switches:
        with monkeypatch.context() as patch:
            patch.setenv(switch, "1")
            assert len(targets()) == 5


def test_without_the_switch_nothing_changes(parser, tiny):
    args = parser.parse_args(["--model", str(tiny), "--lora-modules", "l=/l"])
    before = dict(vars(args))
    engine = AsyncEngineArgs.from_cli_args(args)
    assert vars(args) == before
    assert "pedro" not in (engine.additional_config or {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pedro-modules", "a=/a"], "--pedro-modules: add --enable-pedro"),
        (["--max-pedros", "2", "--pedro-root", "/x"], "--max-pedros, --pedro-root: add"),
        (["--enable-pedro", "--pedro-root", "/nowhere/at/all"], "not a directory"),
        (["--enable-pedro", "--max-pedros", "4", "--max-cpu-pedros", "2"], "at least max_pedros"),
        (
            ["--enable-pedro", "--pedro-modules", "a=/a", "--lora-modules", "a=/b"],
            "in --pedro-modules and in --lora-modules: a",
        ),
        (["--enable-pedro", "--grpc", "--pedro-modules", "a=/a"], "--grpc has no adapters"),
        (
            ["--enable-pedro", "--pedro-modules", "a=/nowhere", "b=/else"],
            "no adapter_config.json in a=/nowhere, b=/else",
        ),
    ],
)
def test_flags_that_do_not_go_together(parser, flags, message):
    args = parser.parse_args(["model", *flags])
    with pytest.raises(ValueError, match=message):
        apply_flags(args)


def test_the_rust_front_end_is_refused(parser, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="Rust front end"):
        apply_flags(parser.parse_args(["model", "--enable-pedro"]))


@pytest.mark.parametrize(
    "flags",
    [["--max-pedros", "0"], ["--pedro-modules", "a"], ["--pedro-modules", "a=x", "a=y"],
     ["--pedro-target-modules", "o_proj"], ["--pedro-memory-bytes", "0"]],
)  # fmt: skip
def test_bad_values_are_usage_errors(parser, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["model", "--enable-pedro", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err
