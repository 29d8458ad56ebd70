"""Many teachers: what is done is skipped, a fault is one teacher's, vLLM asks all together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from tiny_task import make_prompts, make_tokenizer

from vllm_pedro.adapter import load_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench.adapters import write_lora
from vllm_pedro.distill import fleet
from vllm_pedro.distill.teachers import read_teachers
from vllm_pedro.errors import PedroError


@pytest.fixture
def teachers(folder: Path, lora_teacher: Path, pedro_teacher: Path, tmp_path: Path) -> Path:
    """Three LoRA adapters and a PEDRO adapter."""
    target = tmp_path / "teachers"
    shape = BackboneShape.from_pretrained(folder)
    write_lora(target / "c", shape, 1, 0.15, 3)
    write_lora(target / "d", shape, 2, 0.15, 4, ("q_proj", "k_proj"))
    shutil.copytree(lora_teacher, target / "a")
    shutil.copytree(pedro_teacher, target / "b")
    return target


def distilling(folder: Path, teachers: Path, prompts: Path, output: Path) -> list[object]:
    return [
        *("distill", "--model", folder, "--teachers", teachers, "--prompts", prompts),
        *("--output", output, "--max-new-tokens", 4, "--r", 4, "--max-steps", 4),
        *("--eval-steps", 2, "--use-cpu", "true", "--limit", 40),
    ]


def adapters_of(out: str) -> dict[str, Any]:
    return dict(json.loads(out.splitlines()[-1])["adapters"])


def test_a_fleet_of_four(
    folder: Path,
    teachers: Path,
    prompts: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [*distilling(folder, teachers, prompts, tmp_path / "out"), "--engine", "transformers"]
    argv += ["--answers-folder", tmp_path / "answers"]
    weights = teachers / "d" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    learn, calls = fleet.learn, []

    def fail_once(work: Any, *args: Any) -> Any:
        calls.append(work.job.teacher)
        if len(calls) == 2:
            raise RuntimeError("out of memory, as it were")
        return learn(work, *args)

    with monkeypatch.context() as patch:
        patch.setattr(fleet, "learn", fail_once)
        status, out, err = run(*argv)
    assert status == 2
    assert [Path(str(call)).name for call in calls] == ["a", "b", "c", "b"]
    assert "b: failed: out of memory" in err
    found = adapters_of(out)
    assert "PEFT cannot load this teacher" in found["d"]["fault"]
    rows = [[c.strip() for c in line.split("|")] for line in out.splitlines() if line[0] == "|"]
    assert [row[1] for row in rows[2:]] == ["a", "b", "c", "d"]
    assert [row[2] for row in rows[2:5]] == ["peft", "pedro", "peft"]

    kept = {path.parent.name for path in (tmp_path / "answers").glob("*/answers.jsonl")}
    assert kept == {"a", "b", "c"}
    weights.write_bytes(whole)
    status, out, _ = run(*argv)
    assert status == 0
    again = adapters_of(out)
    assert {name: again[name] for name in "abc"} == {name: found[name] for name in "abc"}
    assert out.count("was there") == 3
    # One alone comes to the same, so nothing is left on the backbone by those before it.
    alone = [*argv, "--teacher", teachers / "c"]
    place = alone.index("--teachers")
    del alone[place : place + 2]
    alone[alone.index("--output") + 1] = tmp_path / "alone"
    assert run(*alone)[0] == 0
    digests = [load_adapter(path).digest for path in (tmp_path / "alone", tmp_path / "out" / "c")]
    assert digests[0] == digests[1]


@pytest.mark.engine
def test_vllm_asks_all_together_and_serves_what_the_report_says(
    folder: Path, teachers: Path, prompts: Path, tmp_path: Path, run: Run
) -> None:
    from engines import start_engine
    from vllm import SamplingParams

    from vllm_pedro import PedroRequest

    outputs = {}
    for engine in ("vllm", "transformers"):
        argv = distilling(folder, teachers, prompts, tmp_path / engine)
        status, out, err = run(*argv, "--engine", engine, "--answers", 2)
        assert status == 0, err
        outputs[engine] = adapters_of(out)
    for name, here in outputs["transformers"].items():
        for key in ("kl", "perplexity"):
            served = outputs["vllm"][name]["backbone"][key]
            assert served == pytest.approx(here["backbone"][key], rel=1e-3)
        assert outputs["vllm"][name]["answers"]["number"] == here["answers"]["number"] == 36 * 2 + 4

    tokenizer = make_tokenizer()
    texts = [row["prompt"] for row in make_prompts(150)]
    with start_engine(folder, max_model_len=64) as llm:
        for number, name in enumerate("abcd", 1):
            output = tmp_path / "vllm" / name
            lines = (output / "report_rows.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            asked = [texts[int(row["row"].rpartition(" ")[2]) - 1] for row in rows]
            request = PedroRequest(name, number, str(output))
            found = llm.generate(
                [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in asked],
                SamplingParams(temperature=0, max_tokens=4),
                lora_request=request,
                use_tqdm=False,
            )
            for row, answer in zip(rows, found, strict=True):
                tokens = list(answer.outputs[0].token_ids)
                assert tokens[: len(row["student_tokens"])] == row["student_tokens"]


def test_a_file_names_teachers(tmp_path: Path) -> None:
    lines = ["", "a/one", '{"teacher": "b/one", "name": "two", "prompts": "p.jsonl"}']
    path = tmp_path / "teachers.txt"
    path.write_text("\n".join(lines))
    assert read_teachers(str(path)) == [
        {"teacher": "a/one", "name": "one"},
        {"teacher": "b/one", "name": "two", "prompts": "p.jsonl"},
    ]
    for text, said in (
        ("a/one\nb/one\n", "teachers of one name: 'one'"),
        ("\n", "expected teachers, found none"),
        ('{"name": "x"}', "expected texts 'teacher'"),
        ('{"teacher": "x", "rank": "2"}', "expected texts 'teacher'"),
        ('{"teacher": "x", "name": "../x"}', "expected the name of a folder"),
    ):
        path.write_text(text)
        with pytest.raises(PedroError, match=said):
            read_teachers(str(path))
    with pytest.raises(PedroError, match="expected a folder or file of teachers"):
        read_teachers(str(tmp_path / "nowhere"))
