"""PEDRO as a method of PEFT: the same folder, the same numbers, and what trainers do with it."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from tiny_task import make_folder, make_rows, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from vllm_pedro import PedroConfig, PedroModel, get_pedro_model
from vllm_pedro.adapter import init_adapter, load_adapter, save_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.errors import AdapterError, PedroError
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import Example, Row, encode

peft = pytest.importorskip("peft", reason="PEFT is not installed")

TOKENIZER = make_tokenizer()
DATA = [encode(TOKENIZER, Row("", r["prompt"], r["completion"])) for r in make_rows(32)]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60], [0, 0, 1, 33, 44, 55]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
LABELS = torch.tensor([[-100, -100, -100, 40, 50, 60], [-100, -100, -100, -100, 44, 55]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def adapter(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    config = PedroConfig(r=4, input_norm="rms", base_model_name_or_path=base)
    made = init_adapter(config, BackboneShape.from_pretrained(base), seed=2, scale=0.2)
    save_adapter(folder, config, made.tensors)
    return str(folder)


def backbone(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture(scope="module")
def want(base: str, adapter: str) -> Tensor:
    return logits(PedroModel.from_pretrained(backbone(base), adapter))


# ---- versions


def test_the_window_of_versions_is_the_one_that_is_installed_for() -> None:
    from vllm_pedro.peft import PEFT_VERSIONS

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]["compare"]
    (found,) = [Requirement(line).specifier for line in extras if line.startswith("peft")]
    assert found == PEFT_VERSIONS
    assert importlib.metadata.version("peft") in PEFT_VERSIONS


@pytest.mark.parametrize("order", ["vllm_pedro, peft", "peft, vllm_pedro"])
def test_whichever_is_imported_first(order: str) -> None:
    code = f"import {order}; c = vllm_pedro.PedroConfig(); print(isinstance(c, peft.PeftConfig))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "True\n", output.stderr


def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import vllm_pedro.peft as method

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "PEDRO", PedroConfig)
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    method.register()
    with pytest.raises(PedroError, match=r"needs peft<0.22,>=0.21, found 0.20.0"):
        peft.get_peft_config({"peft_type": "PEDRO"})


# ---- the same numbers


def test_a_fresh_adapter_is_the_identity(base: str) -> None:
    plain = logits(backbone(base))
    model = peft.get_peft_model(backbone(base), PedroConfig(r=4))
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert torch.equal(logits(model), plain)
    trainable, total = model.get_nb_trainable_parameters()
    assert (trainable, total) == get_pedro_model(
        backbone(base), PedroConfig(r=4)
    ).get_nb_trainable_parameters()
    assert set(model.get_model_status().requires_grad.values()) == {True}


def load_with_peft(base: str, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(backbone(base), adapter)


def load_onto_meta(base: str, adapter: str) -> Any:
    return peft.PeftModel.from_pretrained(backbone(base), adapter, low_cpu_mem_usage=True)


def load_second(base: str, adapter: str) -> Any:
    model = peft.get_peft_model(backbone(base), PedroConfig(r=2))
    model.load_adapter(adapter, "other")
    model.set_adapter("other")
    return model.eval()


def load_by_itself(base: str, adapter: str) -> Any:
    return peft.AutoPeftModelForCausalLM.from_pretrained(adapter)


def load_with_transformers(base: str, adapter: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter)


def load_into_transformers(base: str, adapter: str) -> Any:
    model = backbone(base)
    model.load_adapter(adapter, "mine")
    return model


WAYS = (
    load_with_peft,
    load_onto_meta,
    load_second,
    load_by_itself,
    load_with_transformers,
    load_into_transformers,
)


@pytest.mark.parametrize("load", WAYS, ids=lambda way: way.__name__)
def test_bit_for_bit_what_pedro_model_gives(
    load: Callable[[str, str], Any], base: str, adapter: str, want: Tensor
) -> None:
    model = load(base, adapter)
    assert torch.equal(logits(model), want)
    reference = PedroModel.from_pretrained(backbone(base), adapter)
    found, expected = (m(**INPUTS, labels=LABELS) for m in (model, reference))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    for how in ({"num_beams": 3}, {}):
        settings = {"max_new_tokens": 5, "do_sample": False, **how}
        assert torch.equal(
            model.generate(**INPUTS, **settings), reference.generate(**INPUTS, **settings)
        )


def test_prompts_can_be_told(base: str, adapter: str) -> None:
    model = load_with_peft(base, adapter)
    reference = PedroModel.from_pretrained(backbone(base), adapter)
    told = {"prompt_lengths": [2, 3]}
    assert torch.equal(model(**INPUTS, **told).logits, reference(**INPUTS, **told).logits)
    assert torch.equal(
        model.generate(**INPUTS, **told, max_new_tokens=4),
        reference.generate(**INPUTS, **told, max_new_tokens=4),
    )
    with pytest.raises(PedroError, match="labels begin at the first token"):
        model(**INPUTS, labels=IDS)


def test_adapters_come_and_go(base: str, adapter: str, want: Tensor) -> None:
    plain = logits(backbone(base))
    model = load_with_peft(base, adapter)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        assert model(**INPUTS, labels=IDS).loss.isfinite()
    model.add_adapter("fresh", PedroConfig(r=2, pooling="mean"))
    assert torch.equal(logits(model), want)
    model.set_adapter("fresh")
    assert torch.equal(logits(model), plain)
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("fresh")
    assert model.active_adapters == ["default"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_base_model().model.layers[0].vector_generator["default"].up_proj.shift += 1.0
    assert torch.equal(logits(model), want)
    assert not torch.equal(logits(other), want)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(PedroError, match="cannot be merged"):
            merge()
    for call in (model, model.generate):
        with pytest.raises(PedroError, match="one adapter acts on all rows"):
            call(IDS, adapter_names=["__base__"] * len(IDS))
    bare = model.unload()
    assert torch.equal(logits(bare), plain)
    assert set(bare.state_dict()) == set(backbone(base).state_dict())
    assert torch.equal(logits(load_with_peft(base, adapter)), want)
    again = peft.get_peft_model(bare, PedroConfig(r=2))
    assert torch.equal(logits(again), plain)


def test_two_kinds_on_one_backbone_are_refused(base: str) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = backbone(base)
    peft.get_peft_model(model, lora)
    with pytest.raises(PedroError, match="has adapters already"):
        peft.get_peft_model(model, PedroConfig(r=2))
    model = backbone(base)
    pedro = get_pedro_model(model, PedroConfig(r=2))
    for make in (
        lambda: get_pedro_model(model, PedroConfig()),
        lambda: get_pedro_model(pedro, PedroConfig()),
    ):
        with pytest.raises(PedroError, match="has adapters already"):
            make()
    with pytest.raises(PedroError, match="has adapters already"):
        peft.get_peft_model(model, PedroConfig(r=2))


# ---- the same folder


def test_a_folder_is_the_same_byte_for_byte(base: str, adapter: str, tmp_path: Path) -> None:
    load_with_peft(base, adapter).save_pretrained(tmp_path / "peft")
    PedroModel.from_pretrained(backbone(base), adapter).save_pretrained(tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert load_adapter(tmp_path / "peft").digest == load_adapter(tmp_path / "ours").digest
    assert (tmp_path / "peft" / "README.md").exists()


def test_loading_is_checked(base: str, adapter: str, tmp_path: Path) -> None:
    made = load_adapter(adapter)
    some = dict(list(made.tensors.items())[1:])
    broken = {**made.tensors, (name := next(iter(made.tensors))): made.tensors[name] * math.nan}
    for number, (tensors, said) in enumerate(((some, "expected tensors|missing"), (broken, "NaN"))):
        folder = tmp_path / str(number)
        save_adapter(folder, made.config, made.tensors)
        from safetensors.torch import save_file

        save_file(tensors, folder / "adapter_model.safetensors")
        for load in (load_with_peft, load_into_transformers):
            with pytest.raises(AdapterError, match=said):
                load(base, str(folder))


# ---- trainers


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings,
    }


def collate(examples: list[Example]) -> dict[str, Tensor]:
    batch = CompletionCollator(0)(examples)
    del batch["prompt_lengths"]
    return batch


def train(
    base: str, folder: Path, pedro: bool = False, resume: str | None = None, **more: Any
) -> Any:
    torch.manual_seed(3)
    config = PedroConfig(r=4, input_norm="rms")
    make = get_pedro_model if pedro else peft.get_peft_model
    model = make(backbone(base), config)
    args = TrainingArguments(**arguments(folder, remove_unused_columns=False, **more))
    trainer = Trainer(model, args, train_dataset=DATA, data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainers_checkpoints_are_adapters(base: str, tmp_path: Path) -> None:
    saving: Any = {"save_strategy": "steps", "save_steps": 2}
    trainer = train(base, tmp_path, **saving)
    assert losses(trainer) == losses(train(base, tmp_path / "p", pedro=True))
    trainer.save_model(str(tmp_path / "final"))
    for name in ("checkpoint-4", "final"):
        found = PedroModel.from_pretrained(backbone(base), tmp_path / name)
        assert torch.equal(logits(found), logits(trainer.model.eval()))
    again = train(base, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), **saving)
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradient_checkpointing_changes_nothing(base: str, tmp_path: Path) -> None:
    plain = losses(train(base, tmp_path))
    for reentrant in (False, True):
        how = {"use_reentrant": reentrant}
        saving = train(
            base, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how
        )
        assert losses(saving) == pytest.approx(plain, abs=1e-6)


SHARDED = """
import sys
import peft, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from vllm_pedro import PedroConfig, get_pedro_model

torch.distributed.init_process_group("gloo")
for name, make in (("peft", peft.get_peft_model), ("ours", get_pedro_model)):
    torch.manual_seed(3)
    model = make(AutoModelForCausalLM.from_pretrained(sys.argv[1]), PedroConfig(r=4)).train()
    if torch.distributed.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[1, 20, 30, 40, 50, 60]])
    labels = torch.tensor([[-100, -100, -100, 40, 50, 60]])
    for _ in range(2):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{sys.argv[2]}/{name}")
"""


def test_a_sharded_model_saves_the_whole_adapter(base: str, tmp_path: Path) -> None:
    """FSDP2, over two processes; as one process trains it, up to rounding."""
    (tmp_path / "script.py").write_text(SHARDED)
    found = []
    for number in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={number}", "--", str(tmp_path / "script.py"), base]
        done = subprocess.run(
            [*command, str(tmp_path / str(number))], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found += [load_adapter(tmp_path / str(number) / name).tensors for name in ("peft", "ours")]
    for name, tensor in found[0].items():
        for other in found[1:]:
            assert torch.allclose(tensor, other[name], atol=1e-6), name


@pytest.mark.parametrize("pedro", [False, True], ids=["peft", "ours"])
def test_labels_that_are_taken_away_are_missed(base: str, tmp_path: Path, pedro: bool) -> None:
    """Trainer's label smoothing does that; the whole sequence would be pooled, answer and all."""
    with pytest.raises(PedroError, match=r"told what the prompt is.*label_smoothing_factor"):
        train(base, tmp_path, pedro=pedro, label_smoothing_factor=0.1)


def test_other_architectures_have_the_same_files(tmp_path: Path) -> None:
    """Whatever they call their layers, and where their projections are packed."""
    from transformers import (
        Gemma3Config,
        Gemma3ForCausalLM,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        GPT2Config,
        GPT2LMHeadModel,
        Phi3Config,
        Phi3ForCausalLM,
        SiglipVisionConfig,
    )

    sizes = {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    tower = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    text = Gemma3TextConfig(**sizes)
    seeing = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    for make, config in (
        (Phi3ForCausalLM, Phi3Config(**sizes)),
        (Gemma3ForCausalLM, Gemma3TextConfig(**sizes, layer_types=["full_attention"] * 2)),
        (GPT2LMHeadModel, GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4)),
        (Gemma3ForConditionalGeneration, seeing),
    ):
        torch.manual_seed(0)
        model = make(config).eval()
        pedro = PedroConfig(r=3, activation="gelu")
        made = init_adapter(pedro, BackboneShape.from_hf_config(config), seed=2, scale=0.2)
        folder = tmp_path / make.__name__
        save_adapter(folder, pedro, made.tensors)
        expected = logits(PedroModel.from_pretrained(copy.deepcopy(model), folder))
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        assert torch.equal(logits(loaded), expected)
        assert not torch.equal(expected, logits(model))
        loaded.save_pretrained(tmp_path / "again")
        saved = load_adapter(tmp_path / "again", BackboneShape.from_hf_config(config)).tensors
        assert saved.keys() == made.tensors.keys()
        assert all(torch.equal(saved[name], made.tensors[name]) for name in saved)
