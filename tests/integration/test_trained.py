"""What is served is what was trained, for adapters that start from their training data."""

from __future__ import annotations

import json

import pytest
import torch
from scenarios import greedy, tokens

VARIANTS = [
    {"activation": "gelu"},
    {"activation": "rational", "input_norm": "rms", "pooling": "mean"},
    {"activation": "relu", "target_modules": ["v_proj", "gate_proj"], "scope": "answer"},
    {"activation": ["gelu", "rational", "relu"], "pooling": "max"},
]


def train(model, folder, dtype, **config):
    """A few steps of the recipe on random tokens, fast enough for the vectors to move."""
    from transformers import LlamaForCausalLM

    from vllm_pedro import PedroConfig, get_pedro_model
    from vllm_pedro.training.collator import CompletionCollator
    from vllm_pedro.training.data import Example
    from vllm_pedro.training.start import condition
    from vllm_pedro.training.trainer import PedroTrainer, PedroTrainingArguments

    data = [Example(tokens(4 + i % 9, i), tokens(3, 100 + i)) for i in range(32)]
    torch.manual_seed(0)
    values = {"r": 4, "input_norm": "rms", "down_bias": True, **config}
    pedro = get_pedro_model(LlamaForCausalLM.from_pretrained(model), PedroConfig(**values))
    condition(pedro, data, CompletionCollator(0))
    args = PedroTrainingArguments(
        str(folder), max_steps=4, learning_rate=0.1, warmup_steps=0, coefficient_range=4.0,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    PedroTrainer(pedro, args, train_dataset=data, data_collator=CompletionCollator(0)).train()
    pedro.save_pretrained(folder, dtype=dtype)
    return folder


@pytest.mark.engine
@pytest.mark.both_runners
def test_conditioned_adapters_are_served_as_trained(tiny, tiny_engine, tiny_oracle, tmp_path):
    from vllm_pedro import PedroRequest

    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    adapters = [
        train(tiny, tmp_path / str(i), dtype, **config)
        for i, (config, dtype) in enumerate(zip(VARIANTS, dtypes, strict=True))
    ]
    for adapter in adapters:
        assert json.loads((adapter / "adapter_config.json").read_text())["down_bias"]
    prompts = [{"prompt_token_ids": tokens(5 + 7 * i, 200 + i)} for i in range(3)]
    rows = [(prompt, adapter) for adapter in [*adapters, None] for prompt in prompts]
    requests = [
        None if a is None else PedroRequest(a.name, 1 + adapters.index(a), str(a)) for _, a in rows
    ]
    with tiny_engine(max_num_seqs=16) as llm:
        outputs = llm.generate(
            [p for p, _ in rows], greedy(6), lora_request=requests, use_tqdm=False
        )
    answers = {}
    for output, (_, adapter) in zip(outputs, rows, strict=True):
        tiny_oracle.check(output, adapter)
        answers.setdefault(adapter, []).append(tuple(output.outputs[0].token_ids))
    assert len({tuple(a) for a in answers.values()}) == len(answers), "adapters changed nothing"
