"""TRL's trainers on an adapter of PEFT's kind: what is pooled in training is what serving pools."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import make_folder, make_rows, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_pedro import PedroConfig, PedroModel
from vllm_pedro.adapter import load_adapter
from vllm_pedro.errors import PedroError
from vllm_pedro.model.prompts import Prompts
from vllm_pedro.training.data import Example, Row, encode
from vllm_pedro.training.evaluate import TransformersEngine

trl = pytest.importorskip("trl", reason="TRL is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

CONFIG = PedroConfig(r=4, input_norm="rms")
TOKENIZER = make_tokenizer()
ROWS = make_rows(16)
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in ROWS
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " maybe"} for row in ROWS
]
JUDGED = [row | {"label": i % 2 == 0} for i, row in enumerate(ROWS)]


def as_dataset(rows: list[Any]) -> Any:
    # With a fingerprint of its own: datasets 5.2 cannot make one of a pyarrow table.
    return datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint=str(id(rows)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The pooled token ids of every row of every prompt that the model reads."""
    seen: list[tuple[int, ...]] = []
    pooled_tokens = Prompts.pooled_tokens

    def watch(self: Prompts, tokens: Tensor, attention_mask: Any) -> Any:
        mask = pooled_tokens(self, tokens, attention_mask)
        every = torch.ones_like(tokens, dtype=torch.bool)
        for row, chosen in zip(tokens, every if mask is None else mask, strict=True):
            seen.append(tuple(row[chosen].tolist()))
        return mask

    monkeypatch.setattr(Prompts, "pooled_tokens", watch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return seen


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,  # all rows in one
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def prompts_of(rows: list[Any]) -> set[tuple[int, ...]]:
    """As serving makes them."""
    found = set()
    for row in rows:
        if isinstance(row["prompt"], str):
            found.add(tuple(TOKENIZER(row["prompt"])["input_ids"]))
        else:
            text = TOKENIZER.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            found.add(tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"]))
    return found


def as_served(base: str, folder: Path, examples: list[Example]) -> list[list[float]]:
    """Log probabilities of completions' tokens with a saved adapter, as `eval` scores them."""
    model = PedroModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return TransformersEngine(model, TOKENIZER.pad_token_id or 0).completion_logprobs(examples)


def mean_of_sums(base: str, trainer: Any, folder: Path, rows: list[dict[str, str]]) -> float:
    """What trainers of preferences log, of these completions, as served."""
    trainer.save_model(folder)
    examples = [encode(TOKENIZER, Row("", row["prompt"], row["completion"])) for row in rows]
    values = as_served(base, folder, examples)
    return sum(map(sum, values)) / len(values)


@pytest.mark.parametrize("name", ["text", "chats", "checkpointing"])
def test_sft(name: str, base: str, tmp_path: Path, pooled: list[tuple[int, ...]]) -> None:
    """With `peft_config`; what it saves is an adapter, and scores as it was trained."""
    rows = CHATS if name == "chats" else ROWS
    more = {"gradient_checkpointing": name == "checkpointing", "save_strategy": "steps"}
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(**settings(tmp_path, save_steps=2, **more)),
        train_dataset=as_dataset(rows),
        processing_class=TOKENIZER,
        peft_config=CONFIG,
    )
    trainer.train()
    assert pooled
    assert set(pooled) <= prompts_of(rows)
    saved = tmp_path / "checkpoint-2"
    assert load_adapter(saved).config.r == 4
    assert (saved / "README.md").exists()
    ids = torch.tensor([[1, 20, 30, 40]])
    reference = PedroModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, reference(ids).logits)
    examples = []
    for row in trainer.train_dataset:
        at = row["labels"].count(-100)
        examples.append(Example(row["input_ids"][:at], row["input_ids"][at:]))
    values = [x for line in as_served(base, saved, examples) for x in line]
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert loss == pytest.approx(-sum(values) / len(values), abs=1e-5)


def test_sft_on_all_tokens_of_a_chat_is_refused(base: str, tmp_path: Path) -> None:
    """TRL's default for `messages`: it would train for states that serving never makes."""
    rows = [{"messages": row["prompt"] + row["completion"]} for row in CHATS]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=as_dataset(rows),
        processing_class=TOKENIZER,
        peft_config=CONFIG,
    )
    with pytest.raises(PedroError, match=r"labels begin at the first token.*assistant_only_loss"):
        trainer.train()


def trained(base: str, folder: Path) -> Any:
    """A model with an adapter that says something."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "activation" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True
    )


def test_dpo_begins_at_its_reference(
    base: str, tmp_path: Path, pooled: list[tuple[int, ...]]
) -> None:
    """A frozen copy of the adapter is the reference, so the first loss is ln 2."""
    model = trained(base, tmp_path / "first")
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=as_dataset(PAIRS),
        processing_class=TOKENIZER,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".ref." in n}
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert before
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert set(pooled) <= prompts_of(PAIRS)
    found = trainer.evaluate(trainer.train_dataset)
    for answer in ("chosen", "rejected"):
        rows = [{"prompt": row["prompt"], "completion": row[answer]} for row in PAIRS]
        served = mean_of_sums(base, trainer, tmp_path / "last", rows)
        assert found[f"eval_logps/{answer}"] == pytest.approx(served, abs=1e-4)


def test_kto_and_grpo(base: str, tmp_path: Path, pooled: list[tuple[int, ...]]) -> None:
    trainer = trl.KTOTrainer(
        model=trained(base, tmp_path / "kto"),
        args=trl.KTOConfig(**settings(tmp_path)),
        train_dataset=as_dataset(JUDGED),
        processing_class=TOKENIZER,
    )
    trainer.train()
    found = trainer.evaluate(trainer.train_dataset)
    for answer, label in (("chosen", True), ("rejected", False)):
        rows = [row for row in JUDGED if row["label"] == label]
        served = mean_of_sums(base, trainer, tmp_path / "last", rows)
        assert found[f"eval_logps/{answer}"] == pytest.approx(served, abs=1e-4)
    trainer = trl.GRPOTrainer(
        model=trained(base, tmp_path / "grpo"),
        reward_funcs=lambda completions, **how: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(
            **settings(tmp_path, num_generations=4, max_completion_length=6, beta=0.1)
        ),
        train_dataset=as_dataset([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=TOKENIZER,
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert set(pooled) <= prompts_of(ROWS)


def test_rewards_are_no_task_of_an_adapter_here() -> None:
    """vLLM serves PEDRO on generating models; there is nothing to train a reward for."""
    with pytest.raises(PedroError, match="task_type: expected 'CAUSAL_LM'"):
        PedroConfig(task_type="SEQ_CLS")
