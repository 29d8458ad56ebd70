"""The maths of the vector generator."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_pedro import rational as module
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import ACTIVATIONS, INPUT_NORMS, POOLINGS, PedroConfig
from vllm_pedro.errors import PedroError
from vllm_pedro.generator import (
    VectorGenerator,
    activate,
    generate_vectors,
    pool,
    pool_prompt,
    rms_normalize,
)

SHAPE = BackboneShape(
    2,
    16,
    {"q_proj": 16, "k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 24},
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact_gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def random_generator(config: PedroConfig, layer: int = 0, seed: int = 0) -> VectorGenerator:
    torch.manual_seed(seed)
    result = VectorGenerator(config, SHAPE, layer)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "activation" not in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return result


# ---- pooling and the input norm


def test_rms_normalize() -> None:
    hidden = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    size = math.sqrt(12.5 + 1e-6)
    assert torch.allclose(rms_normalize(hidden), torch.tensor([[3 / size, -4 / size], [0.0, 0.0]]))
    small = rms_normalize(torch.full((1, 4), 1e-3))
    assert torch.allclose(
        small, torch.full((1, 4), 1 / math.sqrt(2))
    )  # eps counts, inside the root
    large = rms_normalize(torch.full((1, 4), 6e4, dtype=torch.float16))
    assert large.dtype == torch.float32
    assert torch.allclose(large, torch.ones(1, 4))  # the square leaves the range of float16


def test_pool_by_hand() -> None:
    hidden = torch.tensor([[1.0, -5.0], [2.0, -1.0], [0.0, -3.0]])
    assert pool(hidden, "last").tolist() == [0.0, -3.0]
    assert pool(hidden, "mean").tolist() == [1.0, -3.0]
    assert pool(hidden, "max").tolist() == [2.0, -1.0]
    mask = torch.tensor([True, True, False])
    assert pool(hidden, "last", mask).tolist() == [2.0, -1.0]
    assert pool(hidden, "mean", mask).tolist() == [1.5, -3.0]
    assert pool(hidden, "max", torch.tensor([True, False, True])).tolist() == [1.0, -3.0]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    pooling=st.sampled_from(POOLINGS),
    input_norm=st.sampled_from(INPUT_NORMS),
    seed=st.integers(0, 99),
)
def test_padded_batch_equals_single_sequences(
    lengths: list[int], left: list[int], pooling: str, input_norm: str | None, seed: int
) -> None:
    torch.manual_seed(seed)
    width = 9
    hidden = 100 * torch.randn(len(lengths), width, 16)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, left[row] : left[row] + length] = True
    hidden[~mask] = torch.nan if input_norm is None else 1e4  # padding is never looked at
    pooled = pool_prompt(hidden, pooling, input_norm, mask)
    for row, length in enumerate(lengths):
        alone = pool_prompt(hidden[row, left[row] : left[row] + length], pooling, input_norm)
        assert torch.allclose(pooled[row], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_row_without_prompt_pools_to_zeros(pooling: str) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[False, False, False], [True, False, False]])
    pooled = pool(hidden, pooling, mask)
    assert pooled[0].tolist() == [0.0] * 4
    assert torch.equal(pooled[1], hidden[1, 0])
    (gradient,) = torch.autograd.grad(pooled.sum(), hidden)
    assert torch.equal(gradient[0], torch.zeros(3, 4))


def test_pool_works_in_float32() -> None:
    hidden = torch.tensor([[60000.0], [60000.0]], dtype=torch.float16)
    assert pool(hidden, "mean").item() == pytest.approx(60000, abs=16)
    assert {pool(hidden, name).dtype for name in POOLINGS} == {torch.float32}
    assert pool(hidden.double(), "mean").dtype == torch.float64


def test_pool_refuses_what_does_not_fit() -> None:
    hidden = torch.zeros(2, 3, 4)
    with pytest.raises(PedroError, match=r"bool \[2, 3\], found torch.int64 \[2, 3\]"):
        pool(hidden, "mean", torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(PedroError, match=r"found torch.bool \[2, 4\]"):
        pool(hidden, "mean", torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(PedroError, match=r"found \[4\]"):
        pool(torch.zeros(4), "mean")
    with pytest.raises(PedroError, match="'first'"):
        pool(hidden, "first")
    with pytest.raises(PedroError, match="'layer'"):
        pool_prompt(hidden, "last", "layer")


# ---- activations


def test_gelu_is_exact_and_relu_is_relu() -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    gelu = torch.tensor([exact_gelu(v) for v in x.tolist()], dtype=torch.float64)
    assert (activate(x, "gelu") - gelu).abs().max() < 1e-12  # the tanh form is off by 5e-4
    assert torch.equal(activate(x, "relu"), x.clamp(min=0))
    with pytest.raises(PedroError, match="coefficients"):
        activate(x, "rational")
    with pytest.raises(PedroError, match="'silu'"):
        activate(x, "silu")


# ---- the generator


def naive_vectors(
    layer: VectorGenerator, hidden: list[list[float]], config: PedroConfig, kind: str
) -> list[float]:
    """Section 1 of the design in plain Python."""
    if config.input_norm == "rms":
        hidden = [
            [v / math.sqrt(sum(u * u for u in row) / len(row) + 1e-6) for v in row]
            for row in hidden
        ]
    if config.pooling == "last":
        p = hidden[-1]
    elif config.pooling == "mean":
        p = [sum(column) / len(hidden) for column in zip(*hidden, strict=True)]
    else:
        p = [max(column) for column in zip(*hidden, strict=True)]
    tensors = {name: tensor.tolist() for name, tensor in layer.tensors().items()}
    bias = tensors["up_proj.bias"]
    if config.r == 0:
        return bias
    inner = []
    offsets = tensors.get("down_proj.bias", [0.0] * config.r)
    for row, offset in zip(tensors["down_proj.weight"], offsets, strict=True):
        x = sum(w * v for w, v in zip(row, p, strict=True)) + offset
        if kind == "gelu":
            x = exact_gelu(x)
        elif kind == "relu":
            x = max(x, 0.0)
        else:
            top = sum(a * x**j for j, a in enumerate(tensors["activation.numerator"]))
            q = sum(b * x**i for i, b in enumerate(tensors["activation.denominator"], start=1))
            x = top / (1 + abs(q))
        inner.append(x)
    return [
        b + sum(w * v for w, v in zip(row, inner, strict=True))
        for row, b in zip(tensors["up_proj.weight"], bias, strict=True)
    ]


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize("input_norm", INPUT_NORMS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("down_bias", [False, True])
def test_forward_is_the_formula(
    down_bias: bool, pooling: str, kind: str, input_norm: str | None, r: int
) -> None:
    modules = ["up_proj", "k_proj", "q_proj"]  # not the canonical order
    config = PedroConfig(
        r=r,
        target_modules=modules,
        pooling=pooling,
        input_norm=input_norm,
        activation=kind,
        down_bias=down_bias,
    )
    layer = random_generator(config)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    vectors = layer(hidden)
    assert list(vectors) == modules
    assert [v.shape for v in vectors.values()] == [(24,), (8,), (16,)]
    want = torch.tensor(naive_vectors(layer, hidden.tolist(), config, kind))
    found = torch.cat(list(vectors.values()))
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_norm", INPUT_NORMS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling: str, kind: str, input_norm: str | None) -> None:
    config = PedroConfig(
        r=3,
        target_modules=["k_proj"],
        pooling=pooling,
        input_norm=input_norm,
        activation=kind,
        down_bias=pooling != "max",
    )
    layer = random_generator(config).double()
    hidden = torch.randn(
        2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    names = [name for name, _ in layer.named_parameters()]

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (hidden, mask))["k_proj"]

    assert torch.autograd.gradcheck(run, (hidden, *layer.parameters()))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("down_bias", [False, True])
def test_fresh_generator_is_exactly_one(down_bias: bool, kind: str, r: int) -> None:
    config = PedroConfig(
        r=r, target_modules=list(TARGET_MODULES), activation=kind, down_bias=down_bias
    )
    vectors = VectorGenerator(config, SHAPE, 0)(1000 * torch.randn(2, 5, 16))
    for name in TARGET_MODULES:
        assert torch.equal(vectors[name], torch.ones(2, SHAPE.widths[name]))


def test_initial_values() -> None:
    torch.manual_seed(0)
    shape = BackboneShape(1, 512, SHAPE.widths)
    state = VectorGenerator(PedroConfig(r=64), shape, 0).tensors()
    assert state["down_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["down_proj.weight"].mean().abs().item() < 1e-3
    assert not state["up_proj.weight"].any()
    assert bool((state["up_proj.bias"] == 1).all())
    assert state["activation.numerator"].tolist() == pytest.approx(module.GELU_NUMERATOR)
    assert state["activation.denominator"].tolist() == pytest.approx(module.GELU_DENOMINATOR)


def test_state_dict_names() -> None:
    def names(**values: object) -> dict[str, list[int]]:
        layer = VectorGenerator(PedroConfig(**values), SHAPE, 1)  # type: ignore[arg-type]  # mixed
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
        return {name: list(tensor.shape) for name, tensor in layer.tensors().items()}

    linear = {"down_proj.weight": [4, 16], "up_proj.weight": [48, 4], "up_proj.bias": [48]}
    rational_names = {"activation.numerator": [4], "activation.denominator": [2]}
    assert names(r=4, rational_order=(3, 2)) == linear | rational_names
    assert names(r=4, activation="gelu") == linear
    assert names(r=4, activation=["rational", "relu"]) == linear
    assert names(r=4, activation=["gelu", "rational"], rational_order=(3, 2)) == (
        linear | rational_names
    )
    assert names(r=4, activation="gelu", down_bias=True) == linear | {"down_proj.bias": [4]}
    assert names(r=0) == names(r=0, down_bias=True) == {"up_proj.bias": [48]}


def test_parameters_stay_as_wide_as_float32() -> None:
    """Whoever narrows the model: what a step of 1e-4 changes of b_up, 16 bits do not hold."""
    layer = random_generator(PedroConfig(r=4))
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    for narrow in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)):
        narrow(torch.nn.Sequential(layer, torch.nn.Linear(2, 2)))
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert layer.double().up_proj.bias.dtype == torch.float64
    # As TRL does; most of what b_up was is still there.
    layer.float()
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    layer.eval()
    assert layer(torch.ones(1, 16))["q_proj"].dtype == torch.float32
    layer.train()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    shift, old = layer.up_proj.shift, before["up_proj.bias"] - 1.0
    assert bool(((shift - old).abs() <= old.abs() / 256).all())


@pytest.mark.parametrize("size", [1e-6, 0.3, 3.0])
def test_what_is_saved_is_what_goes_on(size: float) -> None:
    layer = VectorGenerator(PedroConfig(r=0), SHAPE, 0)
    with torch.no_grad():
        layer.up_proj.shift.normal_(0.0, size, generator=torch.Generator().manual_seed(3))
    saved = layer.tensors()
    again = VectorGenerator(PedroConfig(r=0), SHAPE, 0)
    again.load_state_dict(saved)
    assert torch.equal(again.tensors()["up_proj.bias"], saved["up_proj.bias"])
    layer.settle()
    assert torch.equal(layer.up_proj.shift, again.up_proj.shift)
    assert torch.equal(layer.tensors()["up_proj.bias"], saved["up_proj.bias"])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("r", [0, 3])
def test_batch_equals_single_sequences(r: int, pooling: str) -> None:
    layer = random_generator(PedroConfig(r=r, pooling=pooling))
    hidden = torch.randn(3, 6, 16)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    together = layer(hidden, mask)
    for row in range(3):
        for name, vector in layer(hidden[row][mask[row]]).items():
            assert torch.allclose(together[name][row], vector, rtol=1e-5, atol=1e-6)


def test_float32_whatever_comes_in() -> None:
    layer = random_generator(PedroConfig(r=4))
    hidden = (300 * torch.randn(4, 16)).bfloat16()
    plain = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = layer(hidden)
    for name, vector in plain.items():
        assert vector.dtype == torch.float32
        assert bool(vector.isfinite().all())
        assert torch.equal(vector, under_autocast[name])
        assert torch.equal(vector, layer(hidden.float())[name])


def test_generate_vectors_upcasts_its_weights() -> None:
    pooled, down = torch.randn(2, 16), torch.randn(3, 16).half()
    up, bias = torch.randn(5, 3).half(), torch.randn(5).half()
    found = generate_vectors(pooled, down, up, bias, "relu")
    want = (pooled @ down.float().T).clamp(min=0) @ up.float().T + bias.float()
    assert found.dtype == torch.float32
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-5)
    assert generate_vectors(pooled, None, None, bias).shape == (2, 5)
