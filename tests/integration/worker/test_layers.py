"""PEDRO's part of a layer on a small model of vLLM's form: switched, and traced by a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stored import stored
from torch import Tensor, nn
from transformers import LlamaConfig

from vllm_pedro.adapter import init_adapter
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import PedroConfig
from vllm_pedro.integration.worker.layers import HookedModel
from vllm_pedro.integration.worker.places import find_places
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader
from vllm_pedro.serving.columns import StoreColumns
from vllm_pedro.serving.rows import Assignment
from vllm_pedro.serving.runtime import PedroRuntime
from vllm_pedro.serving.spec import RequestSpec
from vllm_pedro.serving.store import VectorStore

WIDTHS = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16}
SHAPE = BackboneShape(2, 8, WIDTHS)
CPU = torch.device("cpu")
SUBSETS = [
    ("q_proj", "v_proj", "up_proj"),
    TARGET_MODULES,
    ("v_proj",),
    ("q_proj",),
    ("k_proj", "gate_proj"),
    ("v_proj", "gate_proj", "up_proj"),
    ("up_proj",),
]


class Projection(nn.Linear):
    """A packed projection returns its bias too, as vLLM's do."""

    def __init__(self, inputs: int, outputs: int, **sizes: Any) -> None:
        super().__init__(inputs, outputs)
        self.__dict__.update(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Norm(nn.Module):
    """Adds the residual, and returns it, as vLLM's fused norms do."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x / (1 + x.square().mean(-1, keepdim=True))
        x = x + residual
        return x / (1 + x.square().mean(-1, keepdim=True)), x


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * torch.cat((k, v), -1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Projection(
            8, 16, total_num_heads=2, total_num_kv_heads=1, head_size=4, v_head_size=4
        )
        self.attn = Attend()

    def forward(self, x: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(x)
        return self.attn(*qkv.split((8, 4, 4), dim=-1))


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x[:, :16]) * x[:, 16:]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = Projection(8, 32, output_sizes=(16, 16))
        self.act_fn = SiluAndMul()
        self.down_proj = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attn = SelfAttention()
        self.mlp = MLP()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        return self.mlp(self.self_attn(x)), residual


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual


def serve(modules: tuple[str, ...], is_compiled: bool) -> tuple[Model, HookedModel]:
    """A model, and with PEDRO in it, with one request, "a", of an adapter on these modules."""
    config = PedroConfig(r=2, target_modules=list(modules))
    adapter = stored(init_adapter(config, SHAPE, seed=1, scale=0.5))
    limits = AdapterLimits(SHAPE, 4, modules)
    model = Model()
    places = find_places(model, LlamaConfig(), SHAPE, modules)
    columns = StoreColumns(SHAPE, [layer.codes for layer in places])
    store = VectorStore(columns, 4, 16, torch.float32, CPU)
    reader = AdapterReader(limits, store.columns, lambda *args, **keywords: adapter)
    runtime = PedroRuntime(AdapterBank(limits.largest_blob, reader, CPU), store)
    runtime.admit("a", RequestSpec("x", "/x", "x", 3, "a"))
    return model, HookedModel(places, LlamaConfig(), runtime, is_compiled)


def own_forwards(model: Model) -> set[str]:
    return {
        n.partition(".")[2].partition(".")[2]
        for n, m in model.named_modules()
        if "forward" in m.__dict__
    }


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def steps(hooked: HookedModel) -> Iterator[Tensor]:
    """A prompt beside a base row, then a decode step, each prepared; yields the step's tokens."""
    hooked.runtime.assign({"a": Assignment(2, True, 1)})
    hooked.prepare_step(["b", "a"], [2, 3], [0, 0])
    yield tokens(5, 1)
    hooked.runtime.step_launched()
    hooked.prepare_step(["b", "a"], [1, 1], [2, 3])
    yield tokens(2, 2)


@torch.inference_mode()
def test_modules_are_as_they_were_in_steps_that_need_nothing() -> None:
    plain = Model()
    model, hooked = serve(("q_proj", "v_proj", "up_proj"), is_compiled=False)
    hooked.prepare_step(["b"], [4], [0])
    assert own_forwards(model) == set()
    assert torch.equal(model(tokens(4, 0)), plain(tokens(4, 0)))
    scaled = {"self_attn.qkv_proj", "mlp.gate_up_proj"}
    expected = [scaled | {"input_layernorm"}, scaled]
    for x, names in zip(steps(hooked), expected, strict=True):
        assert own_forwards(model) == names
        out, base = model(x), plain(x)
        rows = len(x) - (3 if len(x) == 5 else 1)
        assert torch.equal(out[:rows], base[:rows])
        assert not torch.allclose(out[rows:], base[rows:])
    hooked.runtime.finish(["a"])
    hooked.prepare_step(["b"], [1], [3])
    assert own_forwards(model) == set()
    hooked.clear_step()
    assert torch.equal(model(tokens(4, 0)), plain(tokens(4, 0)))


@pytest.mark.parametrize("modules", SUBSETS, ids=lambda m: "+".join(x[0] for x in m))
@torch.inference_mode()
def test_a_traced_model_computes_what_a_switched_one_does(modules: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    plain = Model()
    eager, one = serve(modules, is_compiled=False)
    traced, two = serve(modules, is_compiled=True)
    compiled = torch.compile(traced, backend="eager", fullgraph=True, dynamic=True)
    assert own_forwards(traced) == set()
    for x, y in zip(steps(one), steps(two), strict=True):
        expected, found = eager(x), compiled(y)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        rows = len(x) - (3 if len(x) == 5 else 1)
        assert torch.equal(found[:rows], plain(x)[:rows])
        assert not torch.allclose(found[rows:], plain(x)[rows:])
    for a, b in zip(one.runtime.store.vectors, two.runtime.store.vectors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
