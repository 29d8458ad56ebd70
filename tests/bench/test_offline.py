"""What an offline run compares, and how it goes, with engines that are not there."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from vllm_pedro.adapter import load_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench import offline, results
from vllm_pedro.bench.adapters import CONTENTS, folder_bytes, write_adapters
from vllm_pedro.bench.cases import engine_label, split
from vllm_pedro.bench.driver import Timing
from vllm_pedro.bench.main import QUICK, main, make_parser
from vllm_pedro.bench.offline import FAMILIES, Case, Comparison
from vllm_pedro.bench.results import read_results
from vllm_pedro.bench.workloads import Workload
from vllm_pedro.errors import PedroError

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
CPU = ["base-compiled", "pedro-compiled", "base-eager", "pedro-eager", "lora-eager"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


# Adapters


@pytest.mark.parametrize("kind", ["pedro", "static"])
def test_adapters_fit_the_model_and_each_has_its_own_digest(
    model: str, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoConfig

    shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(model))
    paths = write_adapters(model, tmp_path / "a", kind, CONTENTS + 3)
    assert len({load_adapter(p).digest for p in paths}) == CONTENTS + 3
    for path in (paths[0], paths[-1]):
        adapter = load_adapter(path, shape)
        assert adapter.config.target_modules == ["q_proj", "v_proj", "up_proj"]
        assert adapter.config.r == (12 if kind == "pedro" else 0)
    assert (paths[CONTENTS] / "adapter_model.safetensors").samefile(
        paths[0] / "adapter_model.safetensors"
    )
    assert folder_bytes(paths[0]) > 0


def test_lora_adapters_are_on_the_same_modules(model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (path,) = write_adapters(model, tmp_path / "l", "lora", 1)
    tensors = load_file(path / "adapter_model.safetensors")
    assert len(tensors) == 3 * 3 * 2
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj", "up_proj"}
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    assert tuple(tensors[name].shape) == (48, 8)
    assert all(t.abs().sum() > 0 for t in tensors.values())


def test_adapters_for_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PedroError, match=r"config\.json"):
        write_adapters(str(tmp_path), tmp_path / "a", "pedro", 1)


# The plan


def options(words: str, engines: list[str] | None = None) -> Namespace:
    return make_parser().parse_args([*words.split(), "--engines", *(engines or CPU)])


def plan(words: str) -> list[Comparison]:
    return offline.plan(options(f"offline --workloads {words}"))


def test_quick_compares_lora_with_eager_engines() -> None:
    decode, *others = offline.plan(options(QUICK))
    assert [c.label for c in decode.cases] == [
        "base, compiled",
        "PEDRO, compiled, 1 tenant",
        "PEDRO, compiled, 16 tenants",
        "base, eager",
        "PEDRO, eager, 1 tenant",
        "PEDRO, eager, 16 tenants",
        "LoRA, eager, 1 tenant",
        "LoRA, eager, 16 tenants",
    ]
    assert [c.x for c in others] == [32, 256]
    assert {c.family for c in others} == {"break-even"}


def test_overhead_compares_the_plugin_absent_off_unused_and_used() -> None:
    (comparison,) = plan("overhead --rows 8 --tenants 1 8")
    labels = [case.label for case in comparison.cases]
    assert labels == [
        f"{name.partition(':')[0]}, {mode}{name.partition(':')[2]}"
        for mode in ("compiled", "eager")
        for name in (
            "vLLM, no plugin",
            "base",
            "PEDRO:, unused",
            "PEDRO:, 1 tenant",
            "PEDRO:, 8 tenants",
        )
    ]
    assert [case.engine for case in comparison.cases][:3] == [
        "plain-compiled",
        "base-compiled",
        "pedro-compiled",
    ]


def test_all_families_can_be_planned(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"2023-11-16 18:15:{i:02},100,10\n" for i in range(40))
    )
    words = f"--rows 4 --tenants 1 4 32 --trace {trace} --static"
    everything = plan(f"{' '.join(FAMILIES)} {words}")
    assert {c.family for c in everything} == set(FAMILIES)
    names = [c.workload.name for c in everything]
    assert len(names) == len(set(names))
    for comparison in everything:
        assert comparison.workload.longest <= 1024
        labels = [case.label for case in comparison.cases]
        assert len(labels) == len(set(labels))
    assert any(case.kind == "static" for case in everything[0].cases)
    beam = next(c for c in everything if c.family == "beam")
    assert beam.workload.beam_width == 3
    with pytest.raises(PedroError, match="--trace FILE"):
        plan("trace")


def test_many_tenants_are_left_to_compiled_engines() -> None:
    few, some, many = plan("tenants --rows 4 --tenants 1 8 1000")
    assert [c.x for c in (few, some, many)] == [1, 8, 1000]
    assert len(many.workload.requests) == 1000
    assert {c.mode for c in many.cases if c.kind != "lora"} == {"compiled"}
    # On the CPU vLLM's LoRA runs only eagerly.
    assert [c.tenants for c in many.cases if c.kind == "lora"] == [1, 1000]
    assert {c.mode for c in some.cases} == {"compiled", "eager"}
    # The same requests by one tenant stand beside them.
    assert [c.tenants for c in many.cases if c.kind == "pedro"] == [1, 1000]


def test_lengths_of_many_tenants() -> None:
    names = [c.workload.name for c in plan("tenants --tenants 1 1000")]
    assert names == ["1 tenant, 32 + 16", "1,000 tenants, 16 + 8"]
    for comparison in plan("tenants --tenants 8 1000 --tenant-tokens 64 32"):
        assert comparison.workload.name.endswith(" tenants, 64 + 32")
        assert {(r.prompt_tokens, r.output_tokens) for r in comparison.workload.requests} == {
            (64, 32)
        }


def test_a_task_has_each_request_s_adapter() -> None:
    (comparison,) = plan("decode --rows 4 --tenants 1 4")
    folders = {k: [Path(f"/a/{k}-{i}") for i in range(8)] for k in ("pedro", "lora")}
    workload, adapters = comparison.task(Case("pedro", "eager", 4), folders)
    assert [r.tenant for r in workload.requests] == [0, 1, 2, 3]
    assert adapters == folders["pedro"][:4]
    workload, adapters = comparison.task(Case("base", "eager", 0), folders)
    assert {r.tenant for r in workload.requests} == {None}
    assert not adapters


# A run


class FakeProcess:
    """Takes 1 s for base, 1.25 s for PEDRO, 4 s for LoRA."""

    made: list[tuple[str, str, int]]
    started: list[tuple[str, dict[str, Any]]]

    def __init__(self, engine: str, keywords: dict[str, Any], log: Path) -> None:
        self.started.append((engine, keywords))
        self.engine = engine
        self.facts = {"start_s": 5.0, "engine_s": 3.0, "kv_blocks": 10, "kv_block_bytes": 100}

    def wait(self) -> None:
        pass

    def run(self, workload: Workload, adapters: tuple[Path, ...] = ()) -> list[Timing]:
        tenants = len({r.tenant for r in workload.requests} - {None})
        self.made.append((engine_label(self.engine), workload.name, tenants))
        step = {"base": 1.0, "pedro": 1.25, "lora": 4.0}[split(self.engine)[0]]
        return [
            Timing(r.tenant, 0.0, [step * (i + 1) for i in range(r.output_tokens)])
            for r in workload.requests
        ]

    def peak_bytes(self) -> dict[str, int]:
        return {"host": 2**30}

    def close(self) -> None:
        self.facts.clear()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    monkeypatch.setattr(FakeProcess, "made", [], raising=False)
    monkeypatch.setattr(FakeProcess, "started", [], raising=False)
    monkeypatch.setattr(offline, "EngineProcess", FakeProcess)
    return FakeProcess.made


def bench(*words: str) -> int:
    return main(list(words))


def test_a_run_alternates_and_reports_known_ratios(
    engines: list[tuple[str, str, int]],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    arguments = ["offline", "--model", model, "--workloads", "decode", "--rows", "4"]
    arguments += ["--engines", "base-eager", "pedro-eager", "lora-eager", "--tenants", "1", "4"]
    assert bench(*arguments, "--repeats", "2", "--output", str(output)) == 0
    decode = [(name, tenants) for name, workload, tenants in engines if workload == "decode-heavy"]
    once = [
        ("base, eager", 0),
        ("PEDRO, eager", 1),
        ("PEDRO, eager", 4),
        ("LoRA, eager", 1),
        ("LoRA, eager", 4),
    ]
    assert decode == [*once, *once, *once[::-1]]  # warm-up, there and back

    printed = capsys.readouterr()
    assert "0.80 (0.80-0.80)" in printed.out  # PEDRO / base
    assert "3.20 (3.20-3.20)" in printed.out  # PEDRO / LoRA
    assert "decode-heavy: base, eager: " in printed.err
    records = read_results([output / "results.jsonl"])
    kinds = [r["record"] for r in records]
    assert kinds[0] == "run"
    assert kinds[-1] == "end"
    assert kinds.count("measurement") == 10
    assert kinds.count("load") == 2
    assert (output / "report.md").is_file()
    assert (output / "throughput.png").is_file()

    again = tmp_path / "again"
    assert bench("report", str(output / "results.jsonl"), "--output", str(again)) == 0
    assert (again / "report.md").read_bytes() == (output / "report.md").read_bytes()
    assert (again / "throughput.png").read_bytes() == (output / "throughput.png").read_bytes()


def test_time_is_kept(
    engines: list[tuple[str, str, int]],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each look at the clock takes a minute: after one repeat there is no room for another."""
    now = iter(range(0, 100_000, 60))
    monkeypatch.setattr(results.time, "monotonic", lambda: float(next(now)))
    arguments = ["offline", "--model", model, "--engines", "base-eager", "--workloads", "decode"]
    arguments += ["--minutes", "3", "--repeats", "9", "--no-plots", "--output", str(tmp_path / "o")]
    assert bench(*arguments) == 0
    repeats = [r for r in read_results([tmp_path / "o" / "results.jsonl"]) if "repeat" in r]
    assert 1 <= len(repeats) < 9
    assert "the time is up" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--minutes", "3"],
        ["everything"],
        ["offline", "--workloads", "no"],
        ["offline", "--rows", "0"],
        ["offline", "--minutes", "-1"],
        ["--quick", "--repeats", "x"],
        ["report"],
        ["serving", "--mix", "no"],
    ],
)
def test_wrong_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: vllm-pedro bench" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PedroError, match=r"config\.json"):
        bench("--quick", "--model", str(tmp_path), "--no-plots", "--output", str(tmp_path / "o"))


def test_engines_differ_in_the_adapters_only(
    engines: list[tuple[str, str, int]], model: str, tmp_path: Path
) -> None:
    arguments = ["offline", "--model", model, "--workloads", "decode", "--tenants", "1", "4"]
    arguments += ["--prompt-tokens", "4", "--output-tokens", "2"]
    arguments += ["--rows", "4", "--engines", *CPU, "--no-plots", "--output", str(tmp_path / "o")]
    more = {"load_format": "dummy", "max_loras": 9}
    assert bench(*arguments, "--repeats", "1", "--llm", json.dumps(more)) == 0
    assert [name for name, _ in FakeProcess.started] == CPU
    base = dict(FakeProcess.started)["base-eager"]
    for name, keywords in FakeProcess.started:
        common = {k: v for k, v in keywords.items() if "pedro" not in k and "lora" not in k}
        assert common == base | {"enforce_eager": name.endswith("eager")}
    # The requests that time the loading have to fit, however short the workload is.
    assert base["max_model_len"] > offline.LOAD_PROMPT
    assert base["load_format"] == "dummy"
    assert dict(FakeProcess.started)["lora-eager"]["max_loras"] == 9
    # One slot more than adapters in use: see the note in `cases.slots`.
    assert dict(FakeProcess.started)["pedro-eager"]["max_pedros"] == 5
