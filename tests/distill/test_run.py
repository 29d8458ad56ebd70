"""`vllm-pedro distill`, from a teacher's folder to a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from commands import Run
from tiny_task import make_backbone, make_prompts, make_rows, make_tokenizer, write_rows
from transformers import AutoModelForCausalLM

from vllm_pedro.adapter import load_adapter
from vllm_pedro.distill import run as distill_run
from vllm_pedro.model import PedroModel
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import Example
from vllm_pedro.training.progress import Progress


def distilling(folder: Path, teacher: Path, prompts: Path, output: Path) -> list[object]:
    return [
        *("distill", "--model", folder, "--teacher", teacher, "--prompts", prompts),
        *("--output", output, "--engine", "transformers", "--max-new-tokens", 4, "--r", 4),
        *("--max-steps", 20, "--eval-steps", 10, "--use-cpu", "true", "--logging-steps", 10),
    ]


def report_of(found: tuple[int, str, str], status: int = 0) -> dict[str, Any]:
    assert found[0] == status, found[2]
    return json.loads(found[1].splitlines()[-1])


def test_a_pedro_teacher_of_the_same_form_is_reached(
    folder: Path, pedro_teacher: Path, tmp_path: Path, run: Run
) -> None:
    """From a fresh start with another seed."""
    prompts = write_rows(tmp_path / "many.jsonl", make_prompts(1500))
    argv = distilling(folder, pedro_teacher, prompts, tmp_path / "out")
    argv[argv.index("--max-steps") + 1] = 300
    more = ["--learning-rate", "1.5e-2", "--seed", 7, "--per-device-train-batch-size", 32]
    report = report_of(run(*argv, *more, "--eval-steps", 100, "--top-k", 64, "--threshold", 0.9))
    assert report["backbone"]["kl"] > 0.03
    assert report["student"]["kl"] < 1e-3
    assert report["way"] > 0.97
    assert report["student"]["top_token"] > 0.9
    assert report["student"]["perplexity"] == pytest.approx(
        report["teacher"]["perplexity"], rel=0.02
    )


def test_the_report_is_of_the_adapter_that_was_saved(
    folder: Path, lora_teacher: Path, tmp_path: Path, run: Run
) -> None:
    rows = [row | {"prompt": f"{i}{row['prompt']}"} for i, row in enumerate(make_rows(60))]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "out"
    argv = distilling(folder, lora_teacher, prompts, output)
    found = run(*argv, "--save-dtype", "bfloat16", "--test-metric", "accuracy")
    report = report_of(found)
    assert "rows.jsonl: 60 prompts" in found[2]
    assert "60 prompts to answer, 60 answers of up to 4 tokens: 0.1 MB at most" in found[2]
    assert f"the student has gone {report['way']:.1%} of the way" in found[2]
    assert report["prompts"] == {"train": 48, "dev": 6, "test": 6}
    assert report["way"] == 1 - report["student"]["kl"] / report["backbone"]["kl"]
    assert report["digest"] == load_adapter(output).digest
    for name in ("backbone", "teacher", "student"):
        assert 0 <= report[name]["accuracy"] <= 1
    assert report["bytes"]["answers"] == (output / "answers.jsonl").stat().st_size
    assert json.loads((output / "report.json").read_text())["way"] == report["way"]

    # What the student says in the report is what the saved adapter says.
    model = PedroModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output)
    tokenizer = make_tokenizer()
    lines = [json.loads(line) for line in (output / "report_rows.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        place = int(line["row"].rpartition(" ")[2]) - 1
        ids = torch.tensor([tokenizer(rows[place]["prompt"])["input_ids"]])
        tokens = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :].tolist()
        assert tokens[: len(line["student_tokens"])] == line["student_tokens"]
    agree = sum(line["student_tokens"] == line["teacher_tokens"] for line in lines) / 6
    assert report["student"]["whole_answer"] == pytest.approx(agree)


def test_killed_and_resumed_is_undisturbed(
    folder: Path,
    lora_teacher: Path,
    prompts: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed once while the teacher answers, and once while the student learns."""
    more = ["--answers", 3]
    want = report_of(run(*distilling(folder, lora_teacher, prompts, tmp_path / "a"), *more))
    assert want["answers"]["number"] == 3 * 135 + 15
    argv = [*distilling(folder, lora_teacher, prompts, tmp_path / "b"), *more]
    append, chunks = distill_run.AnswerFile.append, []

    def die_asking(self: Any, answers: Any) -> None:
        append(self, answers)
        chunks.append(self.next_chunk)
        if len(chunks) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill_run.AnswerFile, "append", die_asking)
        assert run(*argv)[0] == 130
    with open(tmp_path / "b" / "answers.jsonl", "ab") as file:
        file.write(b'{"answers":[{"tokens":[1')

    def die_learning(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 15:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die_learning)
        assert run(*argv)[0] == 130
    one, other = ((tmp_path / name / "answers.jsonl").read_bytes() for name in "ab")
    assert one == other
    status, _, err = run(*argv)
    assert (status, "--resume goes on with it" in err) == (2, True)
    found = run(*argv, "--resume")
    assert "to answer" not in found[2]
    report = report_of(found)
    for key in ("digest", "way", "student", "backbone", "teacher"):
        assert report[key] == want[key]
    # What is done is not done again.
    assert report_of(run(*argv, "--resume"))["digest"] == want["digest"]


def test_labels_are_a_share_of_the_loss(
    folder: Path, lora_teacher: Path, tmp_path: Path, run: Run
) -> None:
    rows = [row | {"prompt": f"{i}{row['prompt']}"} for i, row in enumerate(make_rows(60))]
    del rows[3]["completion"]
    prompts = write_rows(tmp_path / "rows.jsonl", rows)
    reports = {}
    for share in (0.0, 0.5):
        argv = distilling(folder, lora_teacher, prompts, tmp_path / f"out{share}")
        more = ["--label-share", share, "--answers-folder", tmp_path / "answers"]
        reports[share] = report_of(run(*argv, *more))
    without, half = (reports[share]["student"] for share in (0.0, 0.5))
    assert half["label_perplexity"] < without["label_perplexity"]
    assert half["kl"] > without["kl"]


def test_every_form_of_teacher_is_asked(
    folder: Path, prompts: Path, tmp_path: Path, run: Run
) -> None:
    """LoRA with ranks of its own, rsLoRA and DoRA, on several modules; a whole model."""
    modules = ["q_proj", "o_proj", "down_proj"]
    forms: dict[str, dict[str, Any]] = {
        "patterns": {"rank_pattern": {"o_proj": 6}, "alpha_pattern": {"q_proj": 24}},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
    }
    for name, form in forms.items():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, task_type="CAUSAL_LM", target_modules=modules, init_lora_weights=False, **form
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(tmp_path / name)
    whole = make_backbone()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    seen = set()
    for name in (*forms, "whole"):
        argv = distilling(folder, tmp_path / name, prompts, tmp_path / f"{name}-out")
        report = report_of(run(*argv, "--max-steps", 2, "--limit", 30))
        assert report["backbone"]["kl"] > 1e-3
        seen.add(report["backbone"]["kl"])
        assert report["kind"] == ("model" if name == "whole" else "peft")
    assert len(seen) == 4


def test_a_memorised_text_is_not_imitated_and_the_status_tells(
    folder: Path, prompts: Path, tmp_path: Path, run: Run
) -> None:
    """A whole model that recites 48 random letters whatever it is asked; it has no tokenizer."""
    letters = torch.randint(67, 93, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer, teacher = make_tokenizer(), make_backbone()
    collate = CompletionCollator(0)
    rows = [
        Example(tokenizer(row["prompt"])["input_ids"], [*letters, 2])
        for row in make_prompts(400, seed=5)
    ]
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for step in range(100):
        batch = collate(rows[4 * step : 4 * step + 4])
        del batch["prompt_lengths"]
        teacher(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.save_pretrained(tmp_path / "teacher")
    argv = distilling(folder, tmp_path / "teacher", prompts, tmp_path / "out")
    more = ["--max-new-tokens", 60, "--max-steps", 40, "--limit", 60]
    report = report_of(run(*argv, *more, "--threshold", 0.9), status=1)
    assert report["teacher"]["perplexity"] < 1.1
    assert report["student"]["perplexity"] > 10
    assert report["student"]["whole_answer"] == 0
    assert 0 < report["way"] < 0.9


def test_chats_without_answers_are_prompts(
    folder: Path, lora_teacher: Path, tmp_path: Path, run: Run
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{i} a"}]} for i in range(8)
    ]
    answer = {"role": "assistant", "content": "x"}
    rows += [{"messages": [{"role": "user", "content": f"{i} b"}, answer]} for i in range(8)]
    rows += [{"prompt": [{"role": "user", "content": f"{i} c"}]} for i in range(8)]
    rows += [{"prompt": [{"role": "user", "content": "7 c"}]}]
    prompts = write_rows(tmp_path / "chats.jsonl", rows)
    found = run(*distilling(folder, lora_teacher, prompts, tmp_path / "out"), "--max-steps", 2)
    assert report_of(found)["prompts"] == {"train": 20, "dev": 2, "test": 2}
    assert "24 prompts; 1 that came before left out" in found[2]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_what_cannot_be_distilled_is_one_line(
    folder: Path, lora_teacher: Path, prompts: Path, tmp_path: Path, run: Run
) -> None:
    broken = Path(shutil.copytree(lora_teacher, tmp_path / "broken"))
    cut(broken / "adapter_model.safetensors")
    half = Path(shutil.copytree(lora_teacher, tmp_path / "half"))
    values = json.loads((half / "adapter_config.json").read_text())
    values["target_modules"].append("o_proj")
    (half / "adapter_config.json").write_text(json.dumps(values))
    other = peft.get_peft_model(
        make_backbone(hidden_size=64),
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    other.save_pretrained(tmp_path / "other")
    make_backbone(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    tokens = Path(shutil.copytree(lora_teacher, tmp_path / "tokens"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tokens)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    for teacher, file, more, said in (
        (broken, prompts, [], "PEFT cannot load this teacher onto the backbone"),
        (half, prompts, [], "broken teacher: Found missing adapter keys"),
        (tmp_path / "other", prompts, [], "is it another backbone's? size mismatch for"),
        (tmp_path / "deeper", prompts, [], "expected a fine-tuned copy of the backbone"),
        (tokens, prompts, [], "differs from the backbone's in 1 tokens: '<call>'"),
        (tmp_path / "nowhere", prompts, [], "found neither"),
        (lora_teacher, empty, [], "expected at least one row, found none"),
        (lora_teacher, prompts, ["--limit", 3], "3 prompts are too few"),
        (lora_teacher, prompts, ["--top-k", 260], "expected less than the 260 tokens"),
        (lora_teacher, prompts, ["--answers", 0], "--answers: expected 1 or more"),
        (lora_teacher, prompts, ["--temperature", 0], "--temperature: expected a number above 0"),
        (lora_teacher, prompts, ["--label-share", 2], "--label-share: expected 0 to 1"),
        (lora_teacher, prompts, ["--held-out", empty], "--held-out: not with distill"),
        (lora_teacher, prompts, ["--max-new-tokens", 126], "prompts have more than 2 tokens"),
    ):
        status, out, err = run(*distilling(folder, teacher, file, tmp_path / "out"), *more)
        last = err.strip().splitlines()[-1]
        assert (status, out) == (2, "")
        assert last.startswith("vllm-pedro: error: ")
        assert said in last
    assert not (tmp_path / "out" / "adapter_config.json").exists()
