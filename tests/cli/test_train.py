"""`vllm-pedro train` and `eval`, from files to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from transformers import set_seed

from vllm_pedro.adapter import load_adapter
from vllm_pedro.config import PedroConfig
from vllm_pedro.model import get_pedro_model
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import load_dataset
from vllm_pedro.training.inspection import PromptUse
from vllm_pedro.training.run import load_backbone
from vllm_pedro.training.trainer import PedroTrainer, PedroTrainingArguments


def training(folder: Path, train_file: Path, output: Path) -> list[object]:
    return [
        *("train", "--model", folder, "--train", train_file, "--output", output),
        *("--max-steps", 8, "--per-device-train-batch-size", 8, "--learning-rate", "1e-2"),
        *("--r", 4, "--use-cpu", "true", "--logging-steps", 2),
    ]


def test_from_a_file_to_an_adapter_to_a_score(
    folder: Path, train_file: Path, dev_file: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "adapter"
    argv = [*training(folder, train_file, output), "--dev", dev_file, "--eval-steps", 4]
    status, out, err = run(*argv, "--save-dtype", "float16", "--weight_decay", "0.01")
    assert status == 0
    record = json.loads(out.splitlines()[-1])
    assert record["steps"] == 8
    assert list(record["dev_losses"]) == ["4", "8"]
    assert record["best_step"] == int(min(record["dev_losses"], key=record["dev_losses"].get))
    assert record["rows"] == {"train": 64, "dev": 24}
    assert json.loads((output / "training.json").read_text())["digest"] == record["digest"]
    assert f"{train_file}: 64 rows" in err
    assert "step 8/8: loss" in err
    assert "tokens/s, 0:00 left" in err
    adapter = load_adapter(output)
    assert adapter.digest == record["digest"]
    assert adapter.config.input_norm == "rms"
    assert adapter.config.down_bias
    use = record["prompt_use"]
    assert use["rows"] == 24
    assert 0 < use["share"] < 1
    # The checkpoint that is the result, in float32.
    assert use["loss"] == pytest.approx(min(record["dev_losses"].values()), rel=0.1)
    assert f"the prompt makes {use['share']:.1%} of what the vectors differ from one" in err
    assert adapter.config.base_model_name_or_path == str(folder)
    best = load_adapter(output / f"checkpoint-{record['best_step']}")
    for name, tensor in best.tensors.items():
        assert torch.equal(tensor.half().float(), adapter.tensors[name])

    scores = {}
    for metric in ("loss", "accuracy", "exact-match", "f1-em", "final-number"):
        status, out, _ = run(
            *("eval", "--model", folder, "--adapter", output, "--data", dev_file),
            *("--metric", metric, "--dtype", "float32", "--max-new-tokens", 6),
        )
        assert status == 0
        scores[metric] = json.loads(out.splitlines()[-1])
    # float16 on disk.
    assert abs(scores["loss"]["loss"] - min(record["dev_losses"].values())) < 1e-2
    assert scores["accuracy"]["rows"] == 24
    assert 0 <= scores["f1-em"]["f1"] <= 1
    _, out, _ = run("eval", "--model", folder, "--data", dev_file, "--metric", "loss")
    assert json.loads(out.splitlines()[-1])["loss"] > scores["loss"]["loss"]


def test_the_same_command_gives_the_same_adapter(
    folder: Path, train_file: Path, tmp_path: Path, run: Run
) -> None:
    digests = [
        json.loads(run(*training(folder, train_file, tmp_path / name), *more)[1])["digest"]
        for name, more in (
            ("a", []),
            ("b", []),
            ("c", ["--seed", 7]),
            ("d", ["--bilevel"]),
            ("e", ["--down-learning-rate", "1e-4"]),
            ("f", ["--base-model-name", "someone/tiny"]),
            ("g", ["--no-fan-in-learning-rates"]),
            ("h", ["--start", "random"]),
            ("i", ["--recipe", "plain"]),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 8
    configs = {name: load_adapter(tmp_path / name).config for name in "adhi"}
    assert {n: (c.down_bias, c.activation) for n, c in configs.items()} == {
        "a": (True, "gelu"),
        "d": (True, "rational"),  # it has coefficients, which --bilevel learns
        "h": (False, "gelu"),
        "i": (False, "rational"),
    }
    named = load_adapter(tmp_path / "f").config
    assert named.base_model_name_or_path == "someone/tiny"


def test_the_plain_recipe_is_one_rate_and_a_random_start(
    folder: Path, train_file: Path, tmp_path: Path, run: Run
) -> None:
    """Bit for bit what Trainer makes of an adapter that the model itself drew."""
    argv = training(folder, train_file, tmp_path / "plain")
    at = argv.index("--learning-rate")
    digest = json.loads(run(*argv[:at], *argv[at + 2 :], "--recipe", "plain")[1])["digest"]

    model, tokenizer = load_backbone(str(folder), torch.float32)
    set_seed(42)
    config = PedroConfig(r=4, input_norm="rms", base_model_name_or_path=str(folder))
    pedro = get_pedro_model(model, config)
    args = PedroTrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    PedroTrainer(
        pedro,
        args,
        train_dataset=load_dataset(train_file, tokenizer),
        data_collator=CompletionCollator(tokenizer.pad_token_id),
    ).train()
    assert pedro.save_pretrained(tmp_path / "by hand") == digest


def test_an_adapter_that_does_not_use_the_prompt_is_told(
    folder: Path, train_file: Path, tmp_path: Path, run: Run
) -> None:
    argv = training(folder, train_file, tmp_path / "a")
    # Too slow for the generators to learn anything; b_up alone moves.
    status, out, err = run(*argv, "--recipe", "plain", "--learning-rate", "1e-6")
    assert status == 0
    assert "warning: the adapter ends as (IA)3" in err
    assert not PromptUse(**json.loads(out)["prompt_use"]).matters
    status, out, err = run(*training(folder, train_file, tmp_path / "b"), "--r", 0)
    assert status == 0
    assert json.loads(out)["prompt_use"] is None
    assert "(IA)3" not in err  # asked for


def test_resume_goes_on_to_the_same_adapter(
    folder: Path, train_file: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_pedro.training.progress import Progress

    whole = training(folder, train_file, tmp_path / "whole")
    want = json.loads(run(*whole, "--save-steps", 3)[1])["digest"]

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    argv = [*training(folder, train_file, tmp_path / "broken"), "--save-steps", 3]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die)
        assert run(*argv)[0] == 130
    status, _, err = run(*argv)
    assert status == 2
    assert "--resume goes on with it" in err
    assert json.loads(run(*argv, "--resume")[1])["digest"] == want


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resume"], "no checkpoint to resume from"),
        (["--patience", 2], "patience needs dev data"),
        (["--no-such-option", 1], "unknown option --no-such-option"),
        (["--max-steps", 0], "--max-steps: expected 1 or more"),
        (["--report-to", "comet_ml"], "not installed"),
        (["--optim", "adamw_bnb_8bit"], "not installed"),
        (["--output", "/proc/x/y"], "cannot make a folder there"),
        (["--force", "--resume"], "give one of them"),
        (["--adapter", "/nowhere", "--pooling", "mean"], "'--r', '--pooling' cannot be given"),
        (["--held-out", "/nowhere.jsonl"], "No such file"),
        (["--test", "/nowhere.jsonl"], "No such file"),
        (["--chat-template-kwargs", '{"tools": []}'], "'tools' cannot be given"),
        (["--learning-rate", "fast"], "invalid float value: 'fast'"),
        (["--activation", "gelu", "--bilevel"], "no coefficients to learn"),
        (["--activation", "gelu", "relu", "gelu"], "one entry for each of the 2 layers"),
        (["--r", -1], "r: expected an int"),
        (["--max-length", 2], "all 64 rows have more than 2 tokens"),
        (["--dev", "/nowhere.jsonl"], "No such file"),
        (["--model", "/nowhere"], "expected a model's folder"),
    ],
)
def test_train_refuses_in_one_line(
    folder: Path, train_file: Path, tmp_path: Path, run: Run, more: list[object], said: str
) -> None:
    status, _, err = run(*training(folder, train_file, tmp_path / "adapter"), *more)
    last = err.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("vllm-pedro: error: ")
    assert any(part in last for part in said.split("|"))


def without_r(argv: list[object]) -> list[object]:
    place = argv.index("--r")
    return argv[:place] + argv[place + 2 :]


def test_a_trained_adapter_is_not_overwritten_and_can_be_started_from(
    folder: Path, train_file: Path, dev_file: Path, tmp_path: Path, run: Run
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    argv = [*training(folder, train_file, first), "--save-strategy", "no", "--pooling", "mean"]
    record = json.loads(run(*argv)[1])
    status, _, err = run(*argv)
    assert status == 2
    assert "holds an adapter of another training" in err
    assert load_adapter(first).digest == record["digest"]
    assert json.loads(run(*argv, "--force")[1])["digest"] == record["digest"]
    made = run("init", "--model", folder, "--output", second, "--r", 4)
    assert made[0] == 0
    assert load_adapter(second).config.input_norm == "rms"
    status, _, err = run(*training(folder, train_file, second))
    assert (status, "--force replaces it" in err) == (2, True)
    # A warm start begins where the first ended.
    more = [*without_r(training(folder, train_file, tmp_path / "third")), "--adapter", first]
    more += ["--learning-rate", "0", "--save-strategy", "no", "--test", dev_file]
    third = json.loads(run(*more)[1])
    assert load_adapter(tmp_path / "third").config.pooling == "mean"
    for name, tensor in load_adapter(first).tensors.items():
        assert torch.equal(load_adapter(tmp_path / "third").tensors[name], tensor)
    scored = run(
        "eval", "--model", folder, "--adapter", first, "--data", dev_file, "--metric", "loss"
    )
    assert third["test"]["loss"] == json.loads(scored[1].splitlines()[-1])["loss"]
    assert json.loads((tmp_path / "third" / "training.json").read_text())["test"] == third["test"]


def test_resume_passes_over_a_broken_checkpoint_and_ends_with_the_last_step(
    folder: Path, train_file: Path, tmp_path: Path, run: Run
) -> None:
    argv = [*training(folder, train_file, tmp_path / "a"), "--save-steps", 4]
    record = json.loads(run(*argv)[1])
    # All steps are done: nothing is trained, and the record stays.
    status, out, err = run(*argv, "--resume")
    assert (status, json.loads(out)) == (0, record)
    assert "all 8 steps are done" in err
    for name in ("optimizer.pt", "trainer_state.json", "adapter_model.safetensors"):
        file = tmp_path / "a" / "checkpoint-8" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        status, out, err = run(*argv, "--resume")
        found = json.loads(out)
        assert (status, found["digest"]) == (0, record["digest"])
        assert found["resumed_from_step"] == 4
        assert "checkpoint-8: not whole, passed over" in err
        assert file.read_bytes() != whole[: len(whole) // 2]


def test_coefficients_learn_from_held_out_data_of_their_own(
    folder: Path, train_file: Path, dev_file: Path, tmp_path: Path, run: Run
) -> None:
    argv = training(folder, train_file, tmp_path / "a")
    status, _, err = run(*argv, "--held-out", dev_file)
    assert (status, "held-out data are for a bi-level training" in err) == (2, True)
    record = json.loads(run(*argv, "--bilevel", "--held-out", dev_file)[1])
    part = json.loads(run(*training(folder, train_file, tmp_path / "b"), "--bilevel")[1])
    assert record["digest"] != part["digest"]


def test_what_is_pushed(
    folder: Path, train_file: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    seen: list[Any] = []

    def upload(self: Any, repo_id: str, folder_path: Any, allow_patterns: Any, **how: Any) -> str:
        present = [name for name in allow_patterns if (folder_path / name).is_file()]
        seen.append((repo_id, sorted(present)))
        return "there"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **how: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    argv = [*training(folder, train_file, tmp_path / "a"), "--save-steps", 4]
    _, out, _ = run(*argv, "--push-to-hub", "true", "--hub-model-id", "me/mine")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"]
    assert seen == [("me/mine", names)]
    assert json.loads(out)["pushed"] == "there"


def test_eval_writes_what_each_row_was_answered(
    folder: Path, tiny_adapter: Path, dev_file: Path, tmp_path: Path, run: Run
) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"prompt": "ab" * 80, "completion": "x"}, {"prompt": "ab:", "completion": " yes"}]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["eval", "--model", folder, "--adapter", tiny_adapter, "--max-new-tokens", 4]
    written = tmp_path / "out.jsonl"
    scores = {}
    for beams in (1, 3):
        status, out, _ = run(
            *(*argv, "--data", dev_file, "--metric", "f1-em", "--beams", beams),
            *("--output", written),
        )
        assert status == 0
        scores[beams] = written.read_text()
        lines = [json.loads(line) for line in scores[beams].splitlines()]
        found = json.loads(out.splitlines()[-1])
        assert len(lines) == found["rows"] == 24
        assert lines[0].keys() == {"row", "answer", "expected", "f1", "right"}
        assert found["f1_em"] == (found["f1"] + found["exact_match"]) / 2
    assert scores[1] != scores[3]
    _, out, err = run(*argv, "--data", long, "--metric", "loss")
    assert json.loads(out)["rows_too_long"] == 1
    assert "1 rows of more than 128 tokens left out" in err
    for more, said in (
        (["--max-new-tokens", 0], "--max-new-tokens: expected 1 or more, found 0"),
        (["--beams", 2, "--engine", "vllm"], "--beams: only with --engine transformers"),
        (["--output", "/nowhere/x"], "cannot write /nowhere/x"),
    ):
        status, _, err = run(*argv, "--data", dev_file, "--metric", "loss", *more)
        assert (status, said in err.splitlines()[-1]) == (2, True)


def test_a_bad_row_is_named(folder: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    status, _, err = run(*training(folder, path, tmp_path / "adapter"))
    assert status == 2
    assert f"{path}, line 2: 'completion': expected text" in err


def test_packed_training_is_padded_training(
    folder: Path, train_file: Path, tmp_path: Path, run: Run
) -> None:
    losses = []
    for name, more in (("padded", []), ("packed", ["--packing"])):
        _, out, _ = run(*training(folder, train_file, tmp_path / name), *more)
        losses.append(json.loads(out)["train_loss"])
    assert abs(losses[0] - losses[1]) < 1e-3
