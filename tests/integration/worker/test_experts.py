"""Routed experts as vLLM's CPU kernels compute them, and with Up scaled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from runners import current_runner
from torch.nn.functional import silu

from vllm_pedro.integration.worker.experts import _is_packed_in_panels, scaling

HIDDEN, INNER, EXPERTS, CHOICES, TOKENS = 64, 48, 5, 2, 7
PADDED = 64  # as vLLM pads them
COLUMNS = slice(16, 16 + INNER)


def mixture(dtype, number=EXPERTS):
    torch.manual_seed(0)
    w13 = torch.randn(number, 2, INNER, HIDDEN, dtype=dtype) * 0.2
    w2 = torch.randn(number, HIDDEN, INNER, dtype=dtype) * 0.2
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weights = torch.rand(TOKENS, CHOICES)
    experts = torch.stack([torch.randperm(number)[:CHOICES] for _ in range(TOKENS)]).int()
    return w13, w2, hidden, weights, experts


def packed(w13, w2):
    from vllm._custom_ops import cpu_prepack_moe_weight

    missing = PADDED - INNER
    w13 = torch.nn.functional.pad(w13, (0, 0, 0, missing)).flatten(1, 2).contiguous()
    w2 = torch.nn.functional.pad(w2, (0, missing)).contiguous()
    return cpu_prepack_moe_weight(w13, "vec"), cpu_prepack_moe_weight(w2, "vec")


def module(kernel, **config):
    defaults = {"activation": SimpleNamespace(value="silu"), "has_bias": False}
    defaults["experts_per_token"] = CHOICES
    parallel = SimpleNamespace(dp_size=1)
    routed = SimpleNamespace(
        quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel)),
        moe_config=SimpleNamespace(moe_parallel_config=parallel, **defaults | config),
        expert_map=None,
    )
    return SimpleNamespace(routed_experts=routed)


def put_out_by_hand(w13, w2, hidden, weights, experts, factors):
    """Token by token, in float32."""
    found = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            gate, up = w13[expert].float() @ hidden[token].float()
            inner = silu(gate) * up * factors[token].float()
            found[token] += weight * (w2[expert].float() @ inner)
    return found


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_is_scaled_for_tokens_with_an_adapter_alone(dtype, weighs_input):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    w13, w2, hidden, weights, experts = mixture(dtype)
    if weighs_input:
        weights, experts = weights[:, :1].contiguous(), experts[:, :1].contiguous()
    vectors = torch.randn(3, 80, dtype=dtype)
    vectors[0] = 0
    rows = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2])  # one more than there are tokens
    state = SimpleNamespace(
        vectors=vectors, token_rows=rows, counts=torch.tensor([0, 2, 0], dtype=torch.int32)
    )
    kernel = object.__new__(CPUUnquantizedExperts)
    kernel._use_zentorch, kernel.quant_config = False, SimpleNamespace(w1_bias=None, w2_bias=None)
    arguments = {
        "hidden_states": hidden,
        "topk_weights": weights,
        "topk_ids": experts,
        "activation": MoEActivation.SILU,
        "global_num_experts": EXPERTS,
        "apply_router_weight_on_input": weighs_input,
    }
    arguments["w1"], arguments["w2"] = packed(w13, w2)
    unused = ("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2")
    arguments |= dict.fromkeys((*unused, "expert_tokens_meta"))
    plain, found = torch.empty_like(hidden), torch.empty_like(hidden)
    kernel.apply(output=plain, **arguments)
    owner, name, apply = scaling(module(kernel), state, COLUMNS)
    assert (owner, name) == (kernel, "apply")
    apply(output=found, **arguments)
    factors = 1 + vectors[rows[:TOKENS], COLUMNS]
    given = torch.ones_like(weights) if weighs_input else weights
    expected = put_out_by_hand(w13, w2, hidden, given, experts, factors)
    base = rows[:TOKENS] == 0
    assert torch.equal(found[base], plain[base])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    assert (found - plain)[~base].abs().max() > 1
    state.counts.zero_()
    apply(output=found, **arguments)
    assert torch.equal(found, plain)


@pytest.mark.both_runners
def test_up_is_scaled_between_the_products_of_triton(monkeypatch):
    """vLLM's kernel for GPUs, in the interpreter; of so many experts it sorts no tokens."""
    if current_runner() == "v1":
        pytest.skip("without Triton")
    from vllm.model_executor.layers.fused_moe.activation import (
        ApplyMoEActivationConfig,
        MoEActivation,
    )
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    many = 4 * TOKENS * CHOICES
    w13, w2, hidden, weights, experts = mixture(torch.float32, many)
    vectors = torch.randn(3, 80)
    vectors[0] = 0
    rows = torch.tensor([0, 1, 2, 0, 1, 1, 0, 2])
    state = SimpleNamespace(vectors=vectors, token_rows=rows)
    kernel = object.__new__(triton_moe.TritonExperts)
    kernel.quantization_emulation, kernel._lora_context = False, None
    kernel.quant_config = FusedMoEQuantConfig.make()
    kernel.activation_config = ApplyMoEActivationConfig()
    # An operator of a GPU's build: the sum over each token's choices.
    kernel.moe_sum = lambda input, output, *_: output.copy_(input.sum(1))
    monkeypatch.setattr(
        triton_moe,
        "try_get_optimal_moe_config",
        lambda *_, **__: {
            "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1,
            "SPLIT_K": 1, "num_warps": 1, "num_stages": 1,
        },
    )  # fmt: skip
    owner, name, activation = scaling(module(kernel), state, COLUMNS)
    assert (owner, name) == (kernel, "activation")

    def put_out():
        found = torch.empty_like(hidden)
        kernel.apply(
            found, hidden, w13.flatten(1, 2).contiguous(), w2, weights, experts,
            MoEActivation.SILU, many, None, None, None,
            torch.empty(TOKENS, CHOICES, HIDDEN), torch.empty(TOKENS, CHOICES, 2 * INNER),
            None, False,
        )  # fmt: skip
        return found

    plain = put_out()
    kernel.activation = activation
    found = put_out()
    factors = 1 + vectors[rows[:TOKENS], COLUMNS]
    expected = put_out_by_hand(w13, w2, hidden, weights, experts, factors)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    base = rows[:TOKENS] == 0
    assert torch.equal(found[base], plain[base])


def test_weights_are_packed_in_the_order_that_is_known():
    assert _is_packed_in_panels()


def test_experts_that_are_computed_otherwise_are_refused_by_name():
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import (
        TritonExperts,
        TritonWNA16Experts,
    )

    kernel = object.__new__(CPUUnquantizedExperts)
    kernel._use_zentorch = False
    assert scaling(module(kernel), None, COLUMNS)[0] is kernel
    quantised = object.__new__(TritonExperts)
    quantised.quant_config = SimpleNamespace(quant_dtype=torch.int8)
    spread = module(kernel)
    spread.routed_experts.expert_map = torch.arange(4)
    for experts, reason in (
        (module(object.__new__(TritonWNA16Experts)), "computed by TritonWNA16Experts"),
        (module(quantised), "are quantised"),
        (module(kernel, activation=SimpleNamespace(value="swigluoai")), "swigluoai"),
        (module(kernel, has_bias=True), "have biases"),
        (spread, "spread over ranks"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*leave experts_up_proj out"):
            scaling(experts, None, COLUMNS)
