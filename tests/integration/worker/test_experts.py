"""Routed experts as vLLM's CPU kernels compute them, and with Up scaled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from vllm_pedro.integration.worker.experts import _is_packed_in_panels, kernel_of, scaling_apply

HIDDEN, INNER, EXPERTS, CHOICES, TOKENS = 64, 48, 5, 2, 7
PADDED = 64  # as vLLM pads them


def mixture(dtype):
    torch.manual_seed(0)
    w13 = torch.randn(EXPERTS, 2, INNER, HIDDEN, dtype=dtype) * 0.2
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, dtype=dtype) * 0.2
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    weights = torch.rand(TOKENS, CHOICES)
    experts = torch.stack([torch.randperm(EXPERTS)[:CHOICES] for _ in range(TOKENS)]).int()
    return w13, w2, hidden, weights, experts


def packed(w13, w2):
    from vllm._custom_ops import cpu_prepack_moe_weight

    missing = PADDED - INNER
    w13 = torch.nn.functional.pad(w13, (0, 0, 0, missing)).flatten(1, 2).contiguous()
    w2 = torch.nn.functional.pad(w2, (0, missing)).contiguous()
    return cpu_prepack_moe_weight(w13, "vec"), cpu_prepack_moe_weight(w2, "vec")


@pytest.mark.parametrize("weighs_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_is_scaled_for_tokens_with_an_adapter_alone(dtype, weighs_input):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    w13, w2, hidden, weights, experts = mixture(dtype)
    if weighs_input:
        weights, experts = weights[:, :1].contiguous(), experts[:, :1].contiguous()
    vectors = torch.randn(3, 80, dtype=dtype)
    vectors[0] = 1
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
    scaling_apply(kernel, state, slice(16, 16 + INNER))(output=found, **arguments)
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        factor = vectors[rows[token], 16 : 16 + INNER].float()
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            gate, up = w13[expert].float() @ hidden[token].float()
            product = w2[expert].float() @ (silu(gate) * up * factor)
            expected[token] += product * (1 if weighs_input else weight)
    base = rows[:TOKENS] == 0
    assert torch.equal(found[base], plain[base])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    assert (found - plain)[~base].abs().max() > 1
    state.counts.zero_()
    scaling_apply(kernel, state, slice(16, 16 + INNER))(output=found, **arguments)
    assert torch.equal(found, plain)


def test_weights_are_packed_in_the_order_that_is_known():
    assert _is_packed_in_panels()


def module(kernel, **config):
    defaults = {"activation": SimpleNamespace(value="silu"), "has_bias": False}
    parallel = SimpleNamespace(dp_size=1)
    routed = SimpleNamespace(
        quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel)),
        moe_config=SimpleNamespace(moe_parallel_config=parallel, **defaults | config),
        expert_map=None,
    )
    return SimpleNamespace(routed_experts=routed)


def test_experts_that_are_computed_otherwise_are_refused_by_name():
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    kernel = object.__new__(CPUUnquantizedExperts)
    kernel._use_zentorch = False
    assert kernel_of(module(kernel)) is kernel
    spread = module(kernel)
    spread.routed_experts.expert_map = torch.arange(4)
    for experts, reason in (
        (module(object.__new__(TritonExperts)), "computed by TritonExperts"),
        (module(kernel, activation=SimpleNamespace(value="swigluoai")), "swigluoai"),
        (module(kernel, has_bias=True), "have biases"),
        (spread, "spread over ranks"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*leave experts_up_proj out"):
            kernel_of(experts)
