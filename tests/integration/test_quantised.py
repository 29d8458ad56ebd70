"""A quantised backbone: what it computes is vLLM's; PEDRO scales what comes out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_pedro import PedroRequest, load_adapter
from vllm_pedro.adapter import tensor_name

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() != "AVX512",
        reason="vLLM's int8 kernels were tried on AVX-512 alone",
    ),
]

SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**SCHEME, "strategy": "channel", "dynamic": False},
            "input_activations": {**SCHEME, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(model, folder, vectors=None):
    """The model in int8; rows of the scales are multiplied by an adapter's static vectors."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTISATION
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        if vectors is not None:
            layer, module = int(name.split(".")[2]), name.split(".")[4]
            scale = scale * vectors(layer, module)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_int8_weights(tiny, write_adapter, tmp_path):
    """Beside a checkpoint whose scales hold the vectors: the same integers, the same answers."""
    from engines import start_engine
    from vllm import SamplingParams

    adapter = write_adapter(tiny, seed=1, scale=0.3, r=0)
    # Powers of two, whose products have no rounding: one could tip an activation's int8 over.
    draw = torch.Generator().manual_seed(0)
    powers = {
        name: 2.0 ** torch.randint(-1, 2, bias.shape, generator=draw)
        for name, bias in load_file(adapter / "adapter_model.safetensors").items()
    }
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    save_file(powers, adapter / "adapter_model.safetensors", {"format": "pt"})
    widths = {"q_proj": 64, "v_proj": 32, "up_proj": 128}
    tensors = load_adapter(adapter).tensors

    def vectors(layer, module):
        columns = tensors[tensor_name(layer, "up_proj.bias")].split(list(widths.values()))
        return dict(zip(widths, columns, strict=True)).get(module, torch.ones(1))[:, None]

    plain = quantise(tiny, tmp_path / "plain")
    merged = quantise(tiny, tmp_path / "merged", vectors)
    params = SamplingParams(temperature=0.0, max_tokens=16, prompt_logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i * i + 3) % 128 for i in range(n)]} for n in (9, 40)]

    def ask(model, request, **settings):
        keywords = {"skip_tokenizer_init": True, **settings}
        with start_engine(model, request is not None, **keywords) as llm:
            outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
            if request is not None:
                base = llm.generate(prompts, params, use_tqdm=False)
                assert base[1].outputs[0].token_ids != outputs[1].outputs[0].token_ids
            return outputs

    request = PedroRequest("a", 1, str(adapter))
    for mine, wanted in zip(ask(plain, request), ask(merged, None), strict=True):
        assert mine.outputs[0].token_ids == wanted.outputs[0].token_ids
        for a, b in zip(mine.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
            for token in a:
                assert a[token].logprob == b[token].logprob
