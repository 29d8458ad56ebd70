"""Training beside a backbone in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_task import make_backbone, make_rows, make_tokenizer, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from vllm_pedro import PedroConfig, cli, get_pedro_model
from vllm_pedro.adapter import load_adapter
from vllm_pedro.errors import PedroError
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import Example, Row, encode
from vllm_pedro.training.trainer import PedroTrainer, PedroTrainingArguments

peft = pytest.importorskip("peft", reason="PEFT is not installed")

CONFIG = PedroConfig(r=4, input_norm="rms")
TOKENIZER = make_tokenizer()
DATA = [encode(TOKENIZER, Row("", r["prompt"], r["completion"])) for r in make_rows(32)]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


BITSANDBYTES, GPTQMODEL = needs("bitsandbytes"), needs("gptqmodel", "optimum")
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    # bitsandbytes packs 64 columns at a time on the CPU.
    make_backbone(hidden_size=64, intermediate_size=128).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def backbone(folder: Path, bits: int) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def collate(examples: list[Example]) -> Any:
    batch = CompletionCollator(0)(examples)
    del batch["prompt_lengths"]
    return batch


def train(model: Any, folder: Path, ours: bool = False, **more: Any) -> Any:
    make, arguments = (
        (PedroTrainer, PedroTrainingArguments) if ours else (Trainer, TrainingArguments)
    )
    args = arguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        **more,
    )
    collator = CompletionCollator(0) if ours else collate
    trainer = make(model, args, train_dataset=DATA, data_collator=collator)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[-1] < found[0]
    return found


def train_with_all(load: Any, folder: Path) -> list[float]:
    torch.manual_seed(3)
    plain = train(peft.get_peft_model(load(), CONFIG), folder)
    torch.manual_seed(3)
    assert train(get_pedro_model(load(), CONFIG), folder) == pytest.approx(plain, abs=1e-5)
    train(get_pedro_model(load(), CONFIG), folder, ours=True)
    prepared = peft.prepare_model_for_kbit_training(load())
    train(peft.get_peft_model(prepared, CONFIG), folder, gradient_checkpointing=True)
    return list(plain)


@BITSANDBYTES
@BITS
def test_every_trainer_takes_it(folder: Path, tmp_path: Path, bits: int) -> None:
    train_with_all(lambda: backbone(folder, bits), tmp_path)


GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight columns lies in which four bits of a word."""


def packed(values: Tensor) -> Tensor:
    """Eight integers of 4 bits in each int32: `[..., 8]` to `[...]`."""
    words = sum(values[..., i].long() << 4 * i for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def quantise(folder: Path, target: Path, method: str) -> Path:
    """The model with projections in 4 bits, and, beside it, with the same values as floats."""
    tensors = load_file(folder / "model.safetensors")
    rounded = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        groups = tensors.pop(name).t().unflatten(0, (-1, GROUP))  # [groups, 32, outputs]
        scales = (groups.abs().amax(1, keepdim=True) / 7).half()
        values = (groups / scales).round().clamp(-8, 7)
        rounded[name] = (values * scales).flatten(0, 1).t().contiguous()
        values, zeros = values.flatten(0, 1) + 8, torch.full_like(scales[:, 0], 8)
        if method == "gptq":
            parts = {
                "qweight": packed(values.unflatten(0, (-1, 8)).transpose(1, 2)),
                "qzeros": packed(zeros.unflatten(1, (-1, 8)) - 1),
                "g_idx": torch.arange(len(values), dtype=torch.int32) // GROUP,
            }
        else:
            parts = {
                "qweight": packed(values.unflatten(1, (-1, 8))[..., AWQ_ORDER]),
                "qzeros": packed(zeros.unflatten(1, (-1, 8))[..., AWQ_ORDER]),
            }
        for part, tensor in (parts | {"scales": scales[:, 0]}).items():
            tensors[f"{name.removesuffix('weight')}{part}"] = tensor.contiguous()
    for path, found in ((target / method, tensors), (target / "rounded", rounded)):
        shutil.copytree(folder, path)
        save_file(found, path / "model.safetensors", {"format": "pt"})
    # Other backends than torch's are compiled first.
    settings = {"bits": 4, "group_size": GROUP, "quant_method": method, "zero_point": True}
    settings |= {"sym": True, "desc_act": False, "backend": "torch"} if method == "gptq" else {}
    settings |= {"version": "gemm", "backend": "torch_awq"} if method == "awq" else {}
    config = json.loads((target / method / "config.json").read_text())
    config["quantization_config"] = settings
    (target / method / "config.json").write_text(json.dumps(config))
    return target / method


@GPTQMODEL
@torch.compiler.set_stance("force_eager")  # gptqmodel compiles its layers
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_in_4_bits(
    folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training does what it does beside the same weights as floats; the command takes them, too."""
    model = quantise(folder, tmp_path, method)

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    found = train_with_all(lambda: load(model), tmp_path / "runs")
    torch.manual_seed(3)
    wanted = train(peft.get_peft_model(load(tmp_path / "rounded"), CONFIG), tmp_path / "runs")
    assert found == pytest.approx(wanted, abs=1e-3)
    data = write_rows(tmp_path / "train.jsonl", make_rows(32))
    argv = ["train", "--model", model, "--train", data, "--output", tmp_path / "out", "--r", 4]
    assert cli.main([str(part) for part in [*argv, "--max-steps", 3, "--use-cpu", "true"]]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert load_adapter(tmp_path / "out").digest == record["digest"]


@BITSANDBYTES
def test_preparing_after_the_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    """It freezes the adapter; Trainer would take its steps and learn nothing."""
    model = peft.prepare_model_for_kbit_training(peft.get_peft_model(backbone(folder, 4), CONFIG))
    with pytest.raises(PedroError, match=r"is frozen.*has to come before the adapter"):
        train(model, tmp_path)


@BITSANDBYTES
def test_trl_leaves_the_adapter_in_float32(folder: Path, tmp_path: Path) -> None:
    """It narrows what trains beside 4 bits to bfloat16, in which b_up would not move."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(make_rows(32))
    trainer = trl.SFTTrainer(
        model=backbone(folder, 4),
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=10,
            learning_rate=1e-4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset(table, fingerprint="rows"),
        processing_class=TOKENIZER,
        peft_config=CONFIG,
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    moved = [
        tensor - 1.0
        for name, tensor in load_adapter(tmp_path).tensors.items()
        if name.endswith("up_proj.bias")
    ]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert all(bool((delta != 0).all()) for delta in moved)
    assert max(float(delta.abs().max()) for delta in moved) < 2e-3


@BITSANDBYTES
@BITS
def test_the_command(
    folder: Path, tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "train.jsonl", make_rows(32))
    argv = ["train", "--model", folder, "--train", data, "--output", tmp_path / "out", "--r", 4]
    argv += [f"--load-in-{bits}bit", "--max-steps", 3, "--use-cpu", "true"]
    assert cli.main([str(part) for part in argv]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bits"] == bits
    assert load_adapter(tmp_path / "out").digest == record["digest"]
