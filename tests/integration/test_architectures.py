"""Every supported architecture, as a small random model, against plain transformers."""

from __future__ import annotations

import pytest
from architectures import CONFIGS, LAST_ENGINE, make, plain_classes
from engines import Mismatch, Oracle

from vllm_pedro import BackboneShape, PedroRequest
from vllm_pedro.architectures import (
    ARCHITECTURES,
    EXPERTS_UP,
    MODULES,
    TARGET_MODULES,
    Architecture,
)

pytestmark = pytest.mark.engine

SAMPLE = {
    "LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM",
    "CohereForCausalLM", "Olmo2ForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel",
    "FalconForCausalLM", "Qwen2MoeForCausalLM", "Llama4ForCausalLM", "Gemma4ForCausalLM",
    "GraniteMoeHybridForCausalLM",
}  # fmt: skip
"""One of each kind; the others are run with `-m slow`."""
BOTH = {name: [pytest.mark.both_runners] for name in ("Olmo2ForCausalLM", "GPTNeoXForCausalLM")}
COMPILED = [
    "GPTNeoXForCausalLM", "Olmo2ForCausalLM", "CohereForCausalLM", "OlmoeForCausalLM",
    "Gemma4ForCausalLM", "GraniteMoeHybridForCausalLM", "DeepseekV2ForCausalLM",
]  # fmt: skip
"""One of each kind beside Llama's, which most other tests compile; CI runs the first."""
ONLY_COMPILED = {"DeepseekV2ForCausalLM"}
"""Eager, plain vLLM's CPU backend is far away from transformers."""
HYBRID = {"GraniteMoeHybridForCausalLM", "FalconH1ForCausalLM"}
TOLERANCES = {"BloomForCausalLM": 2e-3, "ApertusForCausalLM": 5e-3}
"""Where plain vLLM is so far away from transformers."""


def check(name, engine, write_adapter, folder, served=TARGET_MODULES, **settings):
    """Rows of the base and of two adapters in one batch are as transformers computes them."""
    from vllm import SamplingParams

    model = make(name, folder / "model")
    with plain_classes():
        shape = BackboneShape.from_pretrained(model)
    has = [module for module in served if shape.widths[module]]
    oracle = Oracle(model, keep=4)
    some = [module for module in ("q_proj", "v_proj", "up_proj", EXPERTS_UP) if module in has]
    random = {"scale": 0.2, "down_scale": 15.0}
    with plain_classes():
        adapters = [
            None,
            write_adapter(model, seed=1, target_modules=some, **random),
            write_adapter(model, seed=2, target_modules=has[::-1], pooling="mean", **random),
        ]
    prompts = [
        [(31 * row + 7 * i * i + 3 * i) % 125 + 3 for i in range(5 + 17 * row)] for row in range(6)
    ]
    requests = [
        None if adapters[row % 3] is None else PedroRequest("a", 1, str(adapters[row % 3]))
        for row in range(6)
    ]
    params = SamplingParams(
        temperature=0.0, max_tokens=8, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    if name in HYBRID:
        settings["enable_prefix_caching"] = False
    settings = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 128,
        "pedro_target_modules": served,
        **settings,
    }
    with engine(model, **settings) as llm:
        LAST_ENGINE[:] = [llm.llm_engine.vllm_config]
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            params,
            lora_request=requests,
            use_tqdm=False,
        )
    for row, output in enumerate(outputs):
        tolerance = TOLERANCES.get(name, 5e-4)
        with plain_classes():
            oracle.check(output, adapters[row % 3], logprob_tolerance=tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in SAMPLE) + BOTH.get(name, []))
        for name in ARCHITECTURES
        if name not in ONLY_COMPILED
    ],
)
def test_architecture(name, engine, write_adapter, tmp_path):
    check(name, engine, write_adapter, tmp_path)


@pytest.mark.parametrize(
    "name", [COMPILED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED[1:])]
)
def test_compiled(name, engine, write_adapter, tmp_path):
    check(name, engine, write_adapter, tmp_path, enforce_eager=False)


MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.has_experts]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "Qwen2MoeForCausalLM"))
        for name in MIXTURES
        if name not in ONLY_COMPILED
    ],
)
def test_up_within_experts(name, engine, write_adapter, tmp_path):
    check(name, engine, write_adapter, tmp_path, served=MODULES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OlmoeForCausalLM", "DeepseekV2ForCausalLM"])
def test_up_within_experts_compiled(name, engine, write_adapter, tmp_path):
    check(name, engine, write_adapter, tmp_path, served=MODULES, enforce_eager=False)


def test_unpermuted_vectors_are_noticed(engine, write_adapter, tmp_path, monkeypatch):
    """vLLM permutes the rows of Llama 4's Q and K."""
    name = "Llama4ForCausalLM"
    monkeypatch.setitem(ARCHITECTURES, name, Architecture("llama4_text"))
    with pytest.raises(Mismatch):
        check(name, engine, write_adapter, tmp_path)


def test_each_architecture_has_a_small_model():
    assert set(CONFIGS) == set(ARCHITECTURES)
