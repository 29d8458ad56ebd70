"""The demo: arguments, the whole of it on a tiny model, and the adapters that ship with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from engines import write_random_adapter
from tiny_task import make_backbone, make_tokenizer

from vllm_pedro import demo
from vllm_pedro.adapter import load_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.demo import (
    ADAPTERS,
    QUESTIONS,
    TENANTS,
    Request,
    format_answers,
    make_batch,
    make_parser,
)
from vllm_pedro.errors import PedroError

# SmolLM2-135M.
SMOL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}
DATA = Path(__file__).resolve().parent.parent / "examples" / "demo_data"


@pytest.fixture
def smol(tmp_path: Path) -> Path:
    """A folder that looks like the demo's model as far as its config goes."""
    folder = tmp_path / "smol"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOL))
    return folder


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's changes of the environment do not outlive a test."""
    monkeypatch.setattr(demo, "_be_quiet", lambda: None)
    for name in ("HF_HUB_OFFLINE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0" if "MULTI" in name else "1")


# Arguments


def test_defaults() -> None:
    args = make_parser().parse_args([])
    assert args.max_tokens == 40
    assert not args.compile
    assert args.prompt is None
    assert args.adapter is None


def test_options_that_repeat() -> None:
    args = make_parser().parse_args(
        ["--prompt", "a?", "--prompt", "b?", "--adapter", "x=/p=q", "--adapter", "y=/r"]
    )
    assert args.prompt == ["a?", "b?"]
    assert args.adapter == [("x", "/p=q"), ("y", "/r")]


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter", "x"],
        ["--adapter", "=path"],
        ["--adapter", "x="],
        ["--adapter", "base=path"],
        ["--max-tokens", "0"],
        ["--max-tokens", "-1"],
        ["--max-tokens", "many"],
        ["--max-tokens", "100000"],
        ["--verb"],
        ["stray"],
    ],
)
def test_bad_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(argv)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_add_arguments_works_on_any_parser() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args(["--compile"]).compile


# The whole of it


@pytest.mark.engine
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("chat", [True, False])
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool) -> None:
    model = tmp_path / "model"
    make_backbone(max_position_embeddings=demo.MAX_MODEL_LEN).save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    tokenizer.save_pretrained(model)
    write_random_adapter(model, tmp_path / "a")
    write_random_adapter(model, tmp_path / "b", seed=1, r=2, target_modules=["q_proj"])
    argv = ["--model", str(model), "--adapter", f"own={tmp_path / 'a'}"]
    argv += ["--adapter", f"other={tmp_path / 'b'}", "--max-tokens", "7"]
    assert demo.main([*argv, "--prompt", "Why?", "--prompt", "How?"]) == 0
    output = capsys.readouterr().out
    for text in ("Why?", "How?", "  base   ", "  own    ", "  other  ", ", eager"):
        assert text in output
    assert "6 rows in one batch, " in output
    assert "bench --quick" in output
    assert QUESTIONS[0] not in output
    assert demo.main([*argv, "--prompt", "x" * 600]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-pedro demo: error: vLLM: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "x=/nowhere"], "/nowhere"),
        (["--adapter", "x=/a", "--adapter", "x=/b"], "twice"),
        (["--prompt", " "], "empty"),
        (["--model", "/nowhere"], "/nowhere"),
        ([x for _ in range(65) for x in ("--prompt", "hi")], "at most 256"),
    ],
)
def test_errors_are_one_line(
    argv: list[str],
    message: str,
    smol: Path,
    quiet: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo.main(["--model", str(smol), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-pedro demo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_for_another_model(
    smol: Path, quiet: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (smol / "config.json").write_text(json.dumps(SMOL | {"num_hidden_layers": 12}))
    assert demo.main(["--model", str(smol)]) == 2
    assert "12" in capsys.readouterr().err


def test_interrupt(
    smol: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "load_adapters", interrupt)
    assert demo.main(["--model", str(smol)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_verbose_shows_where_an_error_is_from(smol: Path, quiet: None) -> None:
    with pytest.raises(PedroError):
        demo.main(["--model", str(smol), "--prompt", "", "--verbose"])


# Printing


def test_a_batch_has_every_tenant_for_every_question() -> None:
    assert make_batch(["a", "b"], ["x"]) == [
        Request("a", "base"),
        Request("a", "x"),
        Request("b", "base"),
        Request("b", "x"),
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_fits(width: int) -> None:
    batch = make_batch(["What is " + "very " * 30 + "long?", "b"], ["x", "longer_name"])
    answers = ["word " * 60 for _ in batch]
    lines = format_answers(batch, answers, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("longer_name" in line for line in lines) == 2


def test_the_table_survives_odd_answers() -> None:
    batch = make_batch(["a"], ["x"])
    table = format_answers(batch, ["one\ntwo\n\nthree", ""], 80)
    assert "one two three" in table
    assert "(nothing)" in table


# What ships


@pytest.mark.parametrize("name", TENANTS)
def test_the_adapters_that_ship(name: str, smol: Path) -> None:
    from transformers import AutoConfig

    shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(smol))
    adapter = load_adapter(ADAPTERS / name, shape)
    assert adapter.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert adapter.config.inference_mode
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size < 1_500_000
    page = (ADAPTERS / name / "README.md").read_text()
    for fact in ("Apache-2.0", "`vllm-pedro train --model", "held-out", "| rows |", "| dev loss |"):
        assert fact in page


def test_nothing_else_ships() -> None:
    assert sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir()) == sorted(TENANTS)


def test_the_questions_are_held_out() -> None:
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    split = {row["question"]: row["split"] for row in rows}
    assert len(split) == len(rows)
    assert {split[question] for question in QUESTIONS} == {"test"}
    for name in TENANTS:
        for kind in ("train", "dev"):
            chats = [
                json.loads(line)["messages"]
                for line in (DATA / name / f"{kind}.jsonl").read_text().splitlines()
            ]
            assert {split[chat[0]["content"]] for chat in chats} == {"train"}
    answered = (DATA / "base_answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["question"] for line in answered} == set(split)


@pytest.mark.parametrize(
    ("machine", "capability", "expected"),
    [
        ("x86_64", "AVX2", "float32"),
        ("AMD64", "DEFAULT", "float32"),
        ("x86_64", "AVX512", "auto"),
        ("x86_64", "AVX512_VNNI", "auto"),
        ("aarch64", "DEFAULT", "auto"),
    ],
)
def test_a_cpu_that_emulates_bfloat16_computes_in_float32(
    machine: str, capability: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platform

    import torch

    from vllm_pedro.integration.llm import fast_dtype

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast_dtype() == expected
