"""The demo without an engine: arguments, figures, printing, and the adapters that ship with it."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_pedro import demo
from vllm_pedro.adapter import load_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.demo import (
    ADAPTERS,
    QUESTIONS,
    ROUNDS,
    TENANTS,
    Answer,
    EngineSettings,
    Request,
    Speed,
    format_answers,
    format_speed,
    make_batch,
    make_parser,
    measure,
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


class FakeEngine:
    """Answers with the tenant's name, and takes a known time."""

    description = "a fake"

    def __init__(self, seconds: dict[bool, float] | None = None) -> None:
        self.calls: list[tuple[bool, int, bool]] = []
        self.now = 0.0
        self.seconds = seconds or {True: 2.0, False: 1.0}

    def generate(
        self, batch: Sequence[Request], max_tokens: int, ignore_eos: bool = False
    ) -> list[Answer]:
        mixed = any(row.tenant != "base" for row in batch)
        self.calls.append((mixed, max_tokens, ignore_eos))
        self.now += self.seconds[mixed]
        return [Answer(f"{row.tenant} says", max_tokens) for row in batch]


@pytest.fixture
def smol(tmp_path: Path) -> Path:
    """A folder that looks like the demo's model as far as its config goes."""
    folder = tmp_path / "smol"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOL))
    return folder


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Puts a fake in the place of vLLM."""
    fake = FakeEngine()
    fake_module: Any = types.ModuleType("vllm_pedro.integration.demo")

    @contextmanager
    def start_engine(settings: EngineSettings) -> Iterator[FakeEngine]:
        yield fake

    fake_module.start_engine = start_engine
    monkeypatch.setitem(sys.modules, "vllm_pedro.integration.demo", fake_module)
    monkeypatch.setattr(demo, "_be_quiet", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return fake


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


# The whole of it, on a fake engine


def test_a_run(smol: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    target = smol / "out.json"
    assert demo.main(["--model", str(smol), "--json", str(target), "--max-tokens", "7"]) == 0
    output = capsys.readouterr().out
    for text in (*QUESTIONS, *(f"{name} says" for name in ("base", *TENANTS)), "ratio"):
        assert text in output
    written = json.loads(target.read_text())
    assert set(written["adapters"]) == set(TENANTS)
    assert len(written["answers"]) == len(QUESTIONS) * 4
    assert written["answers"][1] == {
        "prompt": QUESTIONS[0],
        "tenant": "json",
        "text": "json says",
        "tokens": 7,
    }
    assert len(written["speed"]["mixed"]) == ROUNDS


def test_own_prompts_and_adapters(
    smol: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"own={ADAPTERS / 'brief'}"
    assert demo.main(["--model", str(smol), "--adapter", own, "--prompt", "Why?"]) == 0
    output = capsys.readouterr().out
    assert "Why?" in output
    assert "own says" in output
    assert "1 tenant " in output
    assert QUESTIONS[0] not in output
    assert "pirate" not in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "x=/nowhere"], "/nowhere"),
        (["--adapter", "x=/a", "--adapter", "x=/b"], "twice"),
        (["--prompt", " "], "empty"),
        (["--model", "/nowhere"], "/nowhere"),
        ([x for _ in range(65) for x in ("--prompt", "hi")], "at most 256"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ],
)
def test_errors_are_one_line(
    argv: list[str],
    message: str,
    smol: Path,
    engine: FakeEngine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo.main(["--model", str(smol), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-pedro demo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_for_another_model(
    smol: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    (smol / "config.json").write_text(json.dumps(SMOL | {"num_hidden_layers": 12}))
    assert demo.main(["--model", str(smol)]) == 2
    assert "12" in capsys.readouterr().err
    assert not engine.calls


def test_interrupt(
    smol: Path,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> list[Answer]:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupt)
    assert demo.main(["--model", str(smol)]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_verbose_shows_where_an_error_is_from(smol: Path, engine: FakeEngine) -> None:
    with pytest.raises(PedroError):
        demo.main(["--model", str(smol), "--prompt", "", "--verbose"])


# Measuring and printing


def test_measuring_is_fair() -> None:
    engine = FakeEngine({True: 2.0, False: 1.0})
    batch = make_batch(["a", "b"], ["x"])
    speed = measure(engine, batch, 10, rounds=6, clock=lambda: engine.now)
    assert len(engine.calls) == 2 + 12
    assert {call[1:] for call in engine.calls} == {(10, True)}
    order = [mixed for mixed, *_ in engine.calls[2:]]
    assert order == [True, False, False, True] * 3
    assert speed.mixed == pytest.approx([20.0] * 6)
    assert speed.plain == pytest.approx([40.0] * 6)
    assert speed.ratio == pytest.approx(0.5)


def test_a_slow_machine_measures_fewer_rounds() -> None:
    engine, said = FakeEngine({True: 2.0, False: 1.0}), []
    batch = make_batch(["a"], ["x"])
    clock = lambda: engine.now  # noqa: E731
    speed = measure(engine, batch, 10, rounds=6, budget=5.0, clock=clock, say=said.append)
    assert len(speed.mixed) == len(speed.plain) == 2
    assert "measuring: 3 rounds with adapters, as many without, about 6 s" in said[0]
    speed = measure(engine, batch, 10, rounds=6, budget=0.0, clock=clock)
    assert len(speed.mixed) == len(speed.plain) == 1


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
    answers = [Answer("word " * 60, 60) for _ in batch]
    lines = format_answers(batch, answers, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("longer_name" in line for line in lines) == 2


def test_the_table_survives_odd_answers() -> None:
    batch = make_batch(["a"], ["x"])
    table = format_answers(batch, [Answer("one\ntwo\n\nthree", 3), Answer("", 0)], 80)
    assert "one two three" in table
    assert "(nothing)" in table


def test_the_figures_say_what_was_measured() -> None:
    speed = Speed(16, 40, [98.0, 100.0, 96.0], [100.0, 100.0, 100.0])
    text = format_speed(speed, 3, "vLLM on CPU", 100)
    assert "98.0 tokens/s" in text
    assert "0.980" in text
    for fact in ("16 rows", "40 tokens each", "vLLM on CPU", "3 rounds", "no prefix cache"):
        assert fact in " ".join(text.split())


def test_noise_is_admitted() -> None:
    noisy = Speed(16, 40, [50.0, 100.0], [100.0, 100.0])
    quiet = Speed(16, 40, [99.0, 100.0], [100.0, 101.0])
    assert "mean little" in format_speed(noisy, 3, "x", 100)
    assert "mean little" not in format_speed(quiet, 3, "x", 100)


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
