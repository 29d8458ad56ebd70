"""PedroTrainer, and PedroModel in transformers' and TRL's trainers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import make_backbone, make_rows, make_tokenizer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from vllm_pedro.adapter import load_adapter
from vllm_pedro.config import PedroConfig
from vllm_pedro.errors import PedroError
from vllm_pedro.model import PedroModel, get_pedro_model
from vllm_pedro.model.prompts import Prompts
from vllm_pedro.training.collator import CompletionCollator, PackedCollator
from vllm_pedro.training.data import Example, Row, encode
from vllm_pedro.training.trainer import (
    Guard,
    PedroTrainer,
    PedroTrainingArguments,
    TrainingDiverged,
    is_coefficient,
    load_checkpoint,
)

CONFIG = PedroConfig(r=4, input_norm="rms")
TOKENIZER = make_tokenizer()
DATA = [encode(TOKENIZER, Row("", r["prompt"], r["completion"])) for r in make_rows(48)]
DEV = [encode(TOKENIZER, Row("", r["prompt"], r["completion"])) for r in make_rows(24, seed=1)]


def make_trainer(
    folder: Path,
    config: PedroConfig = CONFIG,
    data: Any = DATA,
    collator: Any = None,
    model: Any = None,
    callbacks: Any = None,
    dev: Any = None,
    **settings: Any,
) -> PedroTrainer:
    args = PedroTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **settings,
        }
    )
    if model is None:
        torch.manual_seed(3)
        model = get_pedro_model(make_backbone(), config)
    return PedroTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=dev,
        data_collator=collator or CompletionCollator(0),
        callbacks=callbacks,
    )


def parameters(trainer: PedroTrainer) -> dict[str, Tensor]:
    return {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }


def losses(trainer: PedroTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the loss


@pytest.mark.parametrize("bilevel", [False, True], ids=["joint", "bilevel"])
@pytest.mark.parametrize("collator", [CompletionCollator(0), PackedCollator()], ids=["pad", "pack"])
def test_loss_falls(tmp_path: Path, bilevel: bool, collator: Any) -> None:
    trainer = make_trainer(
        tmp_path, collator=collator, bilevel=bilevel, max_steps=40, logging_steps=10
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.75 * found[0]


@pytest.mark.parametrize("collator", [CompletionCollator(0), PackedCollator()], ids=["pad", "pack"])
def test_only_completions_are_learnt(tmp_path: Path, collator: Any) -> None:
    """The loss is the mean over the completions' tokens, each row alone, its prompt pooled."""
    trainer = make_trainer(tmp_path, collator=collator)
    model = trainer.model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.eval()
    total, count = 0.0, 0
    for example in DATA[:5]:
        ids = torch.tensor([example.prompt + example.completion])
        with torch.no_grad():
            logits = model(ids, prompt_lengths=[len(example.prompt)]).logits[0]
        scores = logits.log_softmax(-1)
        for place, token in enumerate(example.completion, len(example.prompt)):
            total -= float(scores[place - 1, token])
            count += 1
    with torch.no_grad():
        found = trainer.compute_loss(model, trainer.data_collator(DATA[:5]))
    assert math.isclose(float(found), total / count, rel_tol=1e-5)


def test_dev_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    dev = [*DEV[:4], Example(DEV[0].prompt, DEV[0].completion * 5)]
    values = [
        make_trainer(tmp_path, dev=dev, per_device_eval_batch_size=size).evaluate()["eval_loss"]
        for size in (1, 2, 5)
    ]
    assert max(values) - min(values) < 1e-5


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, max_steps=2)
    parts = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2
    )
    whole.train()
    parts.train()
    for one, other in zip(parameters(whole).values(), parameters(parts).values(), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_metrics_get_predictions_that_fit_their_labels(tmp_path: Path) -> None:
    seen: list[tuple[Any, Any]] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append((found.predictions, found.label_ids))
        return {"known": float((found.label_ids != -100).sum())}

    trainer = make_trainer(tmp_path, dev=DEV)
    plain = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = metrics
    result = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(plain, abs=1e-6)
    assert result["eval_known"] == sum(len(example.completion) for example in DEV)
    ((logits, labels),) = seen
    assert logits.shape[:2] == labels.shape
    places = labels[:, 1:] != -100
    scores = torch.tensor(logits[:, :-1][places]).log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(labels[:, 1:][places])[:, None])
    assert -float(chosen.mean()) == pytest.approx(plain, abs=1e-5)
    assert trainer.predict(DEV).predictions.shape[:2] == labels.shape


def test_an_adapter_that_nothing_can_train_is_named(tmp_path: Path) -> None:
    model = get_pedro_model(make_backbone(), CONFIG)
    model.save_pretrained(tmp_path)
    frozen = PedroModel.from_pretrained(make_backbone(), tmp_path)
    with pytest.raises(PedroError, match=r"no parameter to train.*is_trainable=True"):
        make_trainer(tmp_path, model=frozen)


# ---- bi-level optimisation


class Snapshots(TrainerCallback):
    """Keeps the parameters at some moments of each step."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, dict[str, Tensor]]] = []

    def take(self, moment: str, model: Any) -> None:
        self.taken.append((moment, {n: p.detach().clone() for n, p in model.named_parameters()}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take("begin", kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Between the coefficients' turn and the weights'.
        self.take("between", kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take("end", kwargs["model"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bilevel_turns_touch_only_their_own(tmp_path: Path, accumulation: int) -> None:
    snapshots = Snapshots()
    trainer = make_trainer(
        tmp_path,
        bilevel=True,
        max_steps=5,
        callbacks=[snapshots],
        gradient_accumulation_steps=accumulation,
        weight_decay=0.1,
    )
    trainer.train()
    # Each step takes three snapshots. The first step has learning rate 0, by the warm-up, and until
    # W_up has moved from 0 the coefficients have no gradient.
    for number in range(2, 5):
        (_, begin), (_, between), (_, end) = snapshots.taken[3 * number : 3 * number + 3]
        outer = {name for name in begin if not torch.equal(begin[name], between[name])}
        inner = {name for name in begin if not torch.equal(between[name], end[name])}
        generators = {name for name in begin if name.startswith("vector_generators.")}
        assert outer == {name for name in generators if is_coefficient(name)}
        assert inner == {name for name in generators if not is_coefficient(name)}
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if n in generators)


def test_bilevel_splits_the_data(tmp_path: Path) -> None:
    seen: dict[str, set[int]] = {"kept": set(), "held": set()}
    turn = "kept"

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        seen[turn].update(id(example) for example in examples)
        return CompletionCollator(0)(examples)

    class Watched(PedroTrainer):
        def _outer_step(self, model: Any) -> None:
            nonlocal turn
            turn = "held"
            super()._outer_step(model)
            turn = "kept"

    args = make_trainer(tmp_path, bilevel=True, held_out_fraction=0.25, max_steps=20).args
    model = get_pedro_model(make_backbone(), CONFIG)
    Watched(model, args, train_dataset=DATA, data_collator=collate).train()
    assert len(seen["held"]) == 12
    assert len(seen["kept"]) == 36
    assert not seen["held"] & seen["kept"]


def test_bilevel_that_cannot_be(tmp_path: Path) -> None:
    for config in (PedroConfig(r=4, activation="gelu"), PedroConfig(r=0)):
        with pytest.raises(PedroError, match="no coefficients to learn"):
            make_trainer(tmp_path, config=config, bilevel=True)
    with pytest.raises(PedroError, match="needs a train_dataset"):
        make_trainer(tmp_path, data=None, bilevel=True)
    with pytest.raises(PedroError, match="only a PedroModel"):
        make_trainer(tmp_path, model=make_backbone(), bilevel=True)


@pytest.mark.parametrize(
    ("rate", "end"),
    [
        ("coefficient_learning_rate", (".numerator", ".denominator")),
        ("down_learning_rate", ("down_proj.weight",)),
    ],
)
def test_parameters_with_a_rate_of_their_own(
    tmp_path: Path, rate: str, end: tuple[str, ...]
) -> None:
    """A rate of zero holds them, weight decay or not; all others move."""
    settings = {rate: 0.0, "weight_decay": 0.5, "max_steps": 3, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, **settings)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    for name, old in before.items():
        assert torch.equal(old, after[name]) == name.endswith(end), name


def test_learning_rates_by_number_of_inputs(tmp_path: Path) -> None:
    def rates(config: PedroConfig = CONFIG, **settings: Any) -> dict[str, float]:
        trainer = make_trainer(tmp_path, config=config, learning_rate=1e-2, **settings)
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        return {
            ".".join(names[id(parameter)].split(".")[-2:]): group["lr"]
            for group in trainer.create_optimizer().param_groups
            for parameter in group["params"]
        }

    assert set(rates().values()) == {1e-2}
    d = make_backbone().config.hidden_size
    want = {
        "down_proj.weight": 1e-2 * 4 / d,
        "up_proj.weight": 1e-2 * 4 / 16,
        "up_proj.shift": 1e-2,
        "activation.numerator": 1e-3,
        "activation.denominator": 1e-3,
    }
    found = rates(PedroConfig(r=16), fan_in_learning_rates=True)
    assert {name.replace("default.", ""): rate for name, rate in found.items()} == pytest.approx(
        want
    )
    # With few inputs nothing is raised, and a rate that is given is the one.
    assert rates(PedroConfig(r=2), fan_in_learning_rates=True)["up_proj.weight"] == 1e-2
    own = rates(fan_in_learning_rates=True, down_learning_rate=0.5, coefficient_learning_rate=0.25)
    assert own["down_proj.weight"] == 0.5
    assert own["activation.numerator"] == 0.25
    assert rates(PedroConfig(r=0), fan_in_learning_rates=True) == {"up_proj.shift": 1e-2}


@pytest.mark.parametrize("bilevel", [False, True], ids=["joint", "bilevel"])
def test_coefficients_of_high_degrees_move_less(tmp_path: Path, bilevel: bool) -> None:
    """By X^j, in both turns of a bi-level step."""

    def moved(**settings: Any) -> dict[str, Tensor]:
        # In the first step W_up is zero, so that the coefficients have no gradient.
        settings |= {"max_steps": 2, "warmup_steps": 0, "bilevel": bilevel}
        trainer = make_trainer(tmp_path, **settings)
        before = parameters(trainer)
        trainer.train()
        return {name: p - before[name] for name, p in parameters(trainer).items()}

    plain, scaled = moved(), moved(coefficient_range=4.0)
    for name in filter(is_coefficient, plain):
        step, first = plain[name], int(name.endswith("denominator"))
        by = 4.0 ** -torch.arange(first, first + len(step))
        assert step.abs().min() > 1e-3
        assert torch.allclose(scaled[name], step * by, rtol=1e-2, atol=1e-7)
    if not bilevel:  # they moved last
        others = [name for name in plain if not is_coefficient(name)]
        assert all(torch.equal(plain[name], scaled[name]) for name in others)


def test_biases_and_coefficients_do_not_decay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, weight_decay=0.5)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.5 if name.endswith(".weight") else 0.0), name


# ---- batches


def test_batches_of_like_length(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, data=DATA * 4, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    lengths = [len(example) for example in DATA * 4]

    def padding(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(8 * max(batch) - sum(batch) for batch in batches)

    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(lengths)))
        assert padding(orders[-1]) < 0.5 * padding(torch.randperm(len(lengths)).tolist())
    assert orders[0] == orders[2] != orders[1]


# ---- checkpoints


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
@pytest.mark.parametrize("bilevel", [False, True], ids=["joint", "bilevel"])
def test_resumed_is_bit_equal_to_undisturbed(tmp_path: Path, bilevel: bool, sampling: str) -> None:
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                raise Killed

    # Ten steps are more than an epoch; the checkpoint at step 5 lies within the first.
    settings = {"bilevel": bilevel, "max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    settings["train_sampling_strategy"] = sampling
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    broken = make_trainer(tmp_path / "broken", callbacks=[Kill()], **settings)
    with pytest.raises(Killed):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-5"))
    assert resumed.state.global_step == 10
    for name, want in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], want), name
    stopped = make_trainer(tmp_path / "short", **(settings | {"save_steps": 2}))
    load_checkpoint(stopped.model, str(tmp_path / "broken" / "checkpoint-5"))
    assert not torch.equal(
        next(iter(parameters(stopped).values())), next(iter(parameters(whole).values()))
    )


def test_checkpoints_are_adapter_folders(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    adapter = load_adapter(tmp_path / "checkpoint-2", trainer.model.shape)
    assert adapter.config.inference_mode
    for name, tensor in trainer.model.adapter_tensors().items():
        assert torch.equal(adapter.tensors[name], tensor)
    other = get_pedro_model(make_backbone(), PedroConfig(r=4, input_norm=None))
    with pytest.raises(PedroError, match="input_norm is 'rms' there and None here"):
        load_checkpoint(other, str(tmp_path / "checkpoint-2"))


def test_best_checkpoint_is_kept_and_patience_ends(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    trainer = make_trainer(
        tmp_path,
        dev=[Example(e.prompt, DATA[0].completion) for e in DEV],  # labels that contradict
        data=[Example(e.prompt, DATA[1].completion) for e in DATA],
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        learning_rate=0.05,
        callbacks=[EarlyStoppingCallback(2)],
    )
    assert DATA[0].completion != DATA[1].completion
    trainer.train()
    history = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = history.index(min(history))
    assert len(history) == best + 3 < 20
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{2 * (best + 1)}")
    assert math.isclose(trainer.evaluate()["eval_loss"], min(history), rel_tol=1e-5)


# ---- the guard


def test_guard_stops_on_nan_before_the_weights_are_touched(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=PedroConfig(r=4, input_norm=None))
    with torch.no_grad():
        trainer.model.vector_generators["default"][0].activation.numerator[6] = 1e38
        trainer.model.vector_generators["default"][0].down_proj.weight.mul_(1e6)
    before = parameters(trainer)
    with pytest.raises(TrainingDiverged, match=r"diverged at step 1: .*input norm 'rms'.*'gelu'"):
        trainer.train()
    for name, tensor in parameters(trainer).items():
        assert torch.equal(tensor, before[name])


def test_guard_without_exploding() -> None:
    guard = Guard("Try less.")
    for step in range(1, 30):
        guard.see_loss(5.0 / step, step)
        guard.see_norm(1e6 if step % 5 else 1.0, step)
    guard.see_norm(1.0, 30)
    for step in range(1, 5):
        guard.see_norm(1e6, step)
    with pytest.raises(TrainingDiverged, match=r"step 5: the gradient norm was above 100000.*less"):
        guard.see_norm(1e6, 5)
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        Guard("").see_loss(math.nan, 1)
    with pytest.raises(TrainingDiverged, match="the gradient norm is inf"):
        Guard("").see_norm(math.inf, 1)
    rising = Guard("")
    for loss in [2.0] * 10 + [16.0] * 9:
        rising.see_loss(loss, 1)
    with pytest.raises(TrainingDiverged, match="rose from 2 to 16"):
        rising.see_loss(16.0, 20)


def test_guard_can_be_off(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, guard=False, max_steps=1)
    with torch.no_grad():
        trainer.model.vector_generators["default"][0].up_proj.shift.fill_(math.nan)
    trainer.train()


# ---- dtypes, memory


def test_bfloat16_backbone_with_float32_adapter(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = get_pedro_model(make_backbone().bfloat16(), CONFIG)
    trainer = make_trainer(tmp_path, model=model, max_steps=30, logging_steps=10)
    trainer.train()
    assert {p.dtype for p in model.vector_generators.parameters()} == {torch.float32}
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    assert losses(trainer)[-1] < 0.85 * losses(trainer)[0]


@pytest.mark.parametrize("collator", [CompletionCollator(0), PackedCollator()], ids=["pad", "pack"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, collator: Any) -> None:
    plain = make_trainer(tmp_path, max_steps=3, collator=collator)
    saving = make_trainer(tmp_path, max_steps=3, collator=collator, gradient_checkpointing=True)
    plain.train()
    saving.train()
    for one, other in zip(parameters(plain).values(), parameters(saving).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_backbone_never_changes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    before = {n: p.clone() for n, p in trainer.model.base_model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.base_model.named_parameters():
        assert torch.equal(parameter, before[name])


# ---- other trainers


def plain_arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }


def test_transformers_trainer(tmp_path: Path) -> None:
    """Labels alone tell where prompts end; checkpoints hold the adapter, and can be resumed."""

    def collate(examples: list[Example]) -> dict[str, Tensor]:
        batch = CompletionCollator(0)(examples)
        del batch["prompt_lengths"]
        return batch

    def make(**settings: Any) -> Trainer:
        torch.manual_seed(3)
        model = get_pedro_model(make_backbone(), CONFIG)
        args = TrainingArguments(
            **plain_arguments(tmp_path, save_steps=10, remove_unused_columns=False, **settings)
        )
        return Trainer(model, args, train_dataset=DATA, data_collator=collate)

    trainer = make()
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    found = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert found[-1] < 0.85 * found[0]
    size = (tmp_path / "checkpoint-10" / "model.safetensors").stat().st_size
    adapter = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert size < 4 * adapter + 5000
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    for name, tensor in trainer.model.adapter_tensors().items():
        assert torch.equal(again.model.adapter_tensors()[name], tensor)


def test_trl_sft_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    torch.manual_seed(3)
    model = get_pedro_model(make_backbone(), CONFIG)
    seen: list[list[int]] = []
    pooled_tokens = Prompts.pooled_tokens

    def watch(self: Prompts, *args: Any) -> Any:
        seen.append(pooled_tokens(self, *args).sum(1).tolist())  # type: ignore[union-attr]
        return pooled_tokens(self, *args)

    rows = make_rows(48)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**plain_arguments(tmp_path, save_strategy="no")),
        # With a fingerprint of its own: datasets 5.2 cannot make one of a pyarrow table.
        train_dataset=datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rows"),
        processing_class=TOKENIZER,
    )
    monkeypatch.setattr(Prompts, "pooled_tokens", watch)
    trainer.train()
    found = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert found[-1] < 0.85 * found[0]
    lengths = {len(TOKENIZER(row["prompt"])["input_ids"]) for row in rows}
    assert {n for batch in seen for n in batch} == lengths


def test_peft_models_train_on_the_same_data(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    for config in (
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        torch.manual_seed(3)
        model = peft.get_peft_model(make_backbone(), config)
        trainer = make_trainer(tmp_path, model=model, dev=DEV, max_steps=30, logging_steps=10)
        trainer.train()
        # Its loss, of a few columns' logits, is PEFT's own, of all of them.
        model.eval()
        batch = trainer.data_collator(DATA[:5])
        with torch.no_grad():
            found = float(trainer.compute_loss(model, batch))
            del batch["prompt_lengths"]
            assert math.isclose(found, float(model(**batch).loss), rel_tol=1e-5)
        found = losses(trainer)
        assert found[-1] < found[0]
        assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_record_of_a_trainer_is_json(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
