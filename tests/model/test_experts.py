"""Up within the routed experts of a mixture."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from architectures import make, plain_classes

from vllm_pedro import PedroConfig, PedroModel
from vllm_pedro.architectures import EXPERTS_UP
from vllm_pedro.model.experts import scaled_experts

NAME = "Qwen2MoeForCausalLM"
"""Its second layer is dense."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = make(NAME, tmp_path_factory.mktemp("mixture"))
    return getattr(transformers, NAME).from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(backbone, **config):
    model = PedroModel(copy.deepcopy(backbone), PedroConfig(input_norm="rms", **config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.vector_generators.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def rows(*lengths):
    width = max(lengths)
    tokens = torch.arange(len(lengths) * width).view(len(lengths), width) * 7 % 120 + 3
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "use_cache": False}


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def experts_of(model):
    layers = model.model.layers
    return {i: e for i, layer in enumerate(layers) if (e := getattr(layer.mlp, "experts", None))}


def test_one_vector_scales_up_of_all_experts(backbone):
    """Static vectors are what scales rows of the weights."""
    with plain_classes(), torch.no_grad():
        model = with_adapter(backbone, r=0, target_modules=[EXPERTS_UP])
        merged = copy.deepcopy(backbone)
        experts = experts_of(merged)
        assert list(experts) == [0, 2]
        generators = model.vector_generators["default"]
        for index, module in experts.items():
            vector = generators[index].up_proj.shift + 1
            module.gate_up_proj[:, len(vector) :] *= vector[:, None]
        found, plain = model(**rows(9, 9)).logits, backbone(**rows(9, 9)).logits
        assert (found - plain).abs().max() > 0.05
        twin = copy.deepcopy(model)
        unloaded = model.unload()
        close(unloaded(**rows(9, 9)).logits, plain)
        experts_of(unloaded)[0].down_proj.zero_()
        for other in (merged, twin):
            close(other(**rows(9, 9)).logits, found)


def test_each_sequence_has_its_own(backbone):
    config = {"r": 4, "target_modules": ["v_proj", EXPERTS_UP, "up_proj"]}
    with plain_classes(), torch.no_grad():
        for scope in ("sequence", "answer"):
            model = with_adapter(backbone, scope=scope, **config)
            both = rows(9, 6)
            together = model(**both, prompt_lengths=[5, 4]).logits
            for row, (length, pooled) in enumerate(((9, 5), (6, 4))):
                ids = both["input_ids"][row : row + 1, :length]
                alone = model(input_ids=ids, prompt_lengths=[pooled], use_cache=False).logits
                torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_product():
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_experts, module.act_fn = 3, torch.nn.functional.silu
    module.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 5, dtype=torch.float64))
    module.down_proj = torch.nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 3], [2, 0], [0, 2], [1, 2], [2, 1]])  # 3: of another rank
    sequences = torch.tensor([0, 0, 1, 1, 0, 1])

    def put_out(hidden, weights, factor):
        return scaled_experts(module, hidden, index, weights, factor, sequences)

    assert torch.autograd.gradcheck(put_out, (hidden, weights, factor))


def test_peft_trains_and_saves_the_same(backbone, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    import vllm_pedro.peft  # noqa: F401

    config = {"r": 2, "input_norm": "rms", "target_modules": ["v_proj", EXPERTS_UP]}
    with plain_classes():
        model = peft.get_peft_model(copy.deepcopy(backbone), PedroConfig(**config))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vector_generator" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        batch = rows(9, 6)
        labels = batch["input_ids"].masked_fill(torch.arange(9) < 4, -100)
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        trained = model(**batch, labels=labels)
        trained.loss.backward()
        of_experts = {
            name: parameter.grad.abs().sum() > 0
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "up_proj" in name
        }
        assert of_experts
        assert all(of_experts.values())
        model.save_pretrained(tmp_path)
        again = PedroModel.from_pretrained(copy.deepcopy(backbone), tmp_path).eval()
        with torch.no_grad():
            found = again(**batch, prompt_lengths=[4, 4]).logits
    close(found, trained.logits.detach())
