"""PedroModel on tiny random models of every supported architecture."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from vllm_pedro.adapter import init_adapter, load_adapter
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import ACTIVATIONS, INPUT_NORMS, POOLINGS, PedroConfig
from vllm_pedro.errors import AdapterError, PedroError
from vllm_pedro.model import PedroModel, get_pedro_model

# Two orders of the same float32 sums; what an adapter changes is 0.1 and more.
TOLERANCE = 2e-5
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 6},
    "Gemma": {"head_dim": 16},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA | {"layer_types": LAYER_TYPES},
    "Phi3": {},
}
CONFIG = PedroConfig(r=4, target_modules=list(TARGET_MODULES))
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_backbone(name: str = "Llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    config_class = getattr(
        transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    )
    config = config_class(**(SIZES | ARCHITECTURES[name] | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Wide enough that greedy continuations do not repeat one token; biases not zero.
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.12)
    return model


def fill(model: PedroModel, name: str = "default", seed: int = 1, scale: float = 0.3) -> None:
    """Give an adapter random parameters that matter."""
    config = model.pedro_configs[name]
    model.fill_adapter(name, init_adapter(config, model.shape, seed, scale).tensors)


def make(name: str = "Llama", config: PedroConfig = CONFIG, **changes: Any) -> PedroModel:
    model = get_pedro_model(make_backbone(name, **changes), config)
    fill(model)
    return model


def tokens(rows: int = 2, columns: int = 9, seed: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, columns), generator=random)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Gradients only for the tests that say so by asking for `gradients_on`."""
    with torch.set_grad_enabled("gradients_on" in request.fixturenames):
        yield


@pytest.fixture
def gradients_on() -> None:
    pass


@pytest.fixture(scope="module")
def llama() -> PedroModel:
    """A model that tests may read but not change."""
    return make()


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=TOLERANCE)


def count_generator_runs(model: PedroModel) -> list[int]:
    runs = [0]

    def hook(*_: object) -> None:
        runs[0] += 1

    for generators in model.vector_generators.values():
        for generator in generators:
            generator.register_forward_hook(hook)
    return runs


# ---- the maths


def naive_llama(model: PedroModel, ids: list[int], pooled_length: int) -> Tensor:
    """Logits of one sequence, written from the paper and the design, layer by layer, in float64."""
    config, backbone = model.base_model.config, model.base_model.model
    pedro = model.pedro_configs["default"]
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight.double()
        )

    def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
        return x @ layer.weight.double().T

    def rotate(x: Tensor) -> Tensor:  # [tokens, size]
        base = config.rope_parameters["rope_theta"]
        result = torch.empty_like(x)
        for position in range(len(x)):
            for i in range(size // 2):
                angle = position / base ** (2 * i / size)
                a, b = x[position, i], x[position, i + size // 2]
                result[position, i] = a * math.cos(angle) - b * math.sin(angle)
                result[position, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return result

    def vectors(index: int, h: Tensor) -> dict[str, Tensor]:
        state = {
            key: value.double()
            for key, value in model.vector_generators["default"][index].tensors().items()
        }
        prompt = h[:pooled_length]
        if pedro.input_norm == "rms":
            prompt = prompt / (prompt.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        p = {"last": prompt[-1], "mean": prompt.mean(0), "max": prompt.max(0).values}[pedro.pooling]
        x = state["down_proj.weight"] @ p + state.get("down_proj.bias", 0.0)
        kind = pedro.activation_of(index)
        if kind == "rational":
            a, b = state["activation.numerator"], state["activation.denominator"]
            top = sum(a[j] * x**j for j in range(len(a)))
            x = top / (1 + abs(sum(b[i] * x ** (i + 1) for i in range(len(b)))))
        elif kind == "gelu":
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        else:
            x = x.clamp(min=0)
        whole = state["up_proj.weight"] @ x + state["up_proj.bias"]
        result = {name: torch.ones(width).double() for name, width in model.shape.widths.items()}
        position = 0
        for name in pedro.target_modules:
            width = model.shape.widths[name]
            result[name] = whole[position : position + width]
            position += width
        return result

    h = backbone.embed_tokens.weight.double()[ids]
    for index, layer in enumerate(backbone.layers):
        scale = vectors(index, h)
        x = norm(h, layer.input_layernorm.weight)
        attention = layer.self_attn
        q = linear(x, attention.q_proj) * scale["q_proj"]
        k = linear(x, attention.k_proj) * scale["k_proj"]
        v = linear(x, attention.v_proj) * scale["v_proj"]
        mixed = torch.zeros_like(q)
        for head in range(heads):
            group = head // (heads // groups)
            here, shared = (
                slice(head * size, (head + 1) * size),
                slice(group * size, (group + 1) * size),
            )
            query, key = rotate(q[:, here]), rotate(k[:, shared])
            for position in range(len(ids)):
                weights = (key[: position + 1] @ query[position] / math.sqrt(size)).softmax(0)
                mixed[position, here] = weights @ v[: position + 1, shared]
        h = h + linear(mixed, attention.o_proj)
        x = norm(h, layer.post_attention_layernorm.weight)
        gate = linear(x, layer.mlp.gate_proj) * scale["gate_proj"]
        up = linear(x, layer.mlp.up_proj) * scale["up_proj"]
        h = h + linear(gate * torch.sigmoid(gate) * up, layer.mlp.down_proj)
    return linear(norm(h, backbone.norm.weight), model.base_model.lm_head)


@pytest.mark.parametrize(
    "config",
    [
        *(
            PedroConfig(
                r=4,
                pooling=pooling,
                input_norm=norm,
                activation=kind,
                target_modules=["up_proj", "k_proj", "q_proj", "gate_proj", "v_proj"],
            )
            for pooling, norm, kind in zip(
                POOLINGS * 2, INPUT_NORMS * 3, ACTIVATIONS * 2, strict=True
            )
        ),
        PedroConfig(r=4, activation=["rational", "relu", "gelu"]),
        PedroConfig(r=5, target_modules=["v_proj", "q_proj"], rational_order=(3, 2)),
        PedroConfig(r=4, down_bias=True, activation=["rational", "relu", "gelu"]),
    ],
    ids=str,
)
def test_llama_written_out(config: PedroConfig) -> None:
    model = make(config=config)
    ids = tokens(1, 7)
    found = model(ids, prompt_lengths=[4]).logits[0]
    want = naive_llama(model, ids[0].tolist(), 4)
    bare = model.base_model(ids).logits[0]
    assert (found - bare).abs().max() > 0.05
    assert (found.double() - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_every_subset_of_static_vectors_is_a_scaled_backbone(name: str) -> None:
    backbone = make_backbone(name)
    ids = tokens()
    paths = {
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
    }
    for count in range(1, 6):
        for modules in itertools.permutations(TARGET_MODULES, count):
            if list(modules) != sorted(modules, reverse=count % 2 == 0):
                continue  # one order of every subset, the canonical one only by accident
            model = get_pedro_model(backbone, PedroConfig(r=0, target_modules=list(modules)))
            fill(model)
            found = model(ids).logits
            model.unload()
            scaled = copy.deepcopy(backbone)
            for index, layer in enumerate(scaled.model.layers):
                bias = model.vector_generators["default"][index].up_proj.bias
                parts = dict(
                    zip(modules, bias.split(model.shape.split_widths(modules)), strict=True)
                )
                if name == "Phi3":
                    for path, stacked in (
                        ("self_attn.qkv_proj", TARGET_MODULES[:3]),
                        ("mlp.gate_up_proj", TARGET_MODULES[3:]),
                    ):
                        whole = torch.cat(
                            [parts.get(m, torch.ones(model.shape.widths[m])) for m in stacked]
                        )
                        layer.get_submodule(path).weight.mul_(whole[:, None])
                else:
                    for module, part in parts.items():
                        layer.get_submodule(paths[module]).weight.mul_(part[:, None])
            assert close(found, scaled(ids).logits), modules
            assert not close(found, backbone(ids).logits), modules


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    backbone = make_backbone(name)
    names = list(backbone.state_dict())
    ids = tokens()
    bare = backbone(ids).logits
    model = get_pedro_model(backbone, CONFIG)
    assert torch.equal(model(ids).logits, bare)  # fresh: the identity, to the bit
    fill(model)
    whole = model(ids, prompt_lengths=[5, 5], use_cache=False).logits
    assert (whole - bare).abs().max() > 0.1
    assert torch.equal(backbone(ids).logits, bare)  # called directly, without adapters
    assert list(backbone.state_dict()) == names

    # With a cache: the prompt, one token, the rest.
    runs = count_generator_runs(model)
    first = model(ids[:, :5], use_cache=True)
    assert runs == [3]
    second = model(ids[:, 5:6], past_key_values=first.past_key_values)
    third = model(ids[:, 6:], past_key_values=second.past_key_values)
    assert runs == [3]
    stepwise = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert close(stepwise, whole)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_generate_equals_no_cache(name: str, how: dict[str, Any]) -> None:
    model = make(name)
    ids = tokens(2, 6)
    settings = GREEDY | {"max_new_tokens": 8} | how
    torch.manual_seed(0)
    cached = model.generate(ids, **settings)
    torch.manual_seed(0)
    # Recomputed from the whole sequence at every step, with the prompts' length fixed.
    recomputed = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, recomputed)
    torch.manual_seed(0)
    assert not torch.equal(cached, model.base_model.generate(ids, **settings))


# ---- prompts and padding


def pad(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "both": 1}[side]
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask.long()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_padded_batch_equals_single_sequences(name: str, pooling: str, side: str) -> None:
    model = make(name, PedroConfig(r=4, pooling=pooling, input_norm="rms"))
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (7, 3, 5)]
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for lengths in (None, [4, 3, 1], torch.tensor([7, 1, 2])):
        together = model(
            ids, attention_mask=mask, position_ids=positions, prompt_lengths=lengths
        ).logits
        for i, row in enumerate(rows):
            length = None if lengths is None else lengths[i : i + 1]
            alone = model(torch.tensor([row]), prompt_lengths=length).logits[0]
            assert close(together[i][mask[i].bool()], alone)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    pooled=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    side=st.sampled_from(["left", "right", "both"]),
)
def test_lengths_and_masks_say_the_same(
    llama: PedroModel, lengths: list[int], pooled: list[int], side: str
) -> None:
    rows = [tokens(1, n, seed=n)[0].tolist() for n in lengths]
    ids, mask = pad(rows, side)
    chosen = [min(p, n) for p, n in zip(pooled, lengths, strict=False)]
    prompt_mask = mask.bool() & (mask.cumsum(1) <= torch.tensor(chosen)[:, None])
    with torch.no_grad():
        one = llama(ids, attention_mask=mask, prompt_lengths=chosen).logits
        other = llama(ids, attention_mask=mask, prompt_mask=prompt_mask).logits
    assert torch.equal(one, other)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_appended_tokens_change_nothing_before_them(pooling: str) -> None:
    model = make(config=PedroConfig(r=4, pooling=pooling))
    ids = tokens(2, 12)
    short = model(ids[:, :6]).logits
    fixed = model(ids, prompt_lengths=[6, 6]).logits
    assert close(fixed[:, :6], short)
    moving = model(ids).logits
    assert (moving[:, :6] - short).abs().max() > 0.01


def test_left_padded_generation() -> None:
    model = make()
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (6, 3)]
    ids, mask = pad(rows, "left")
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
        settings = GREEDY | {"max_new_tokens": 6} | more
        together = model.generate(ids, attention_mask=mask, prompt_lengths=[4, 3], **settings)
        for i, row in enumerate(rows):
            alone = model.generate(torch.tensor([row]), prompt_lengths=[4 - i], **settings)
            assert together[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist(), more


def test_every_sample_of_a_prompt_pools_that_prompt() -> None:
    model = make()
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (6, 3)]
    ids, mask = pad(rows, "left")
    settings = GREEDY | {
        "max_new_tokens": 1,
        "do_sample": True,
        "num_return_sequences": 2,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = model.generate(ids, attention_mask=mask, prompt_lengths=[4, 3], **settings).logits[0]
    for i, row in enumerate(rows):
        alone = model(torch.tensor([row]), prompt_lengths=[4 - i]).logits[0, -1]
        assert close(found[2 * i], alone)
        assert close(found[2 * i + 1], alone)


def test_padding_token_is_noticed_without_a_mask() -> None:
    model = make()
    ids, mask = pad([tokens(1, 5)[0].tolist()], "left")
    settings = GREEDY | {"max_new_tokens": 4, "eos_token_id": 2}
    assert torch.equal(
        model.generate(ids, **settings), model.generate(ids, attention_mask=mask, **settings)
    )


def test_prompts_that_cannot_be(llama: PedroModel) -> None:
    ids, mask = pad([[5, 6, 7], [8, 9]], "right")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"prompt_lengths": [4, 1]}, r"\[3, 2\], found \[4, 1\]"),
        ({"prompt_lengths": [0, 1]}, r"between 1 and"),
        ({"prompt_lengths": [1]}, "each of the 2 rows"),
        ({"prompt_lengths": [1, 1, 1, 1]}, "each of the 2 rows"),
        ({"prompt_lengths": [1.0, 1.0]}, "expected ints"),
        ({"prompt_lengths": [[1, 1]]}, "expected ints"),
        ({"prompt_mask": torch.ones(2, 4)}, r"expected \[2, 5\], found \[2, 4\]"),
        ({"prompt_mask": torch.ones(2)}, r"expected \[B, S\]"),
        ({"prompt_mask": torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 1]])}, "rows 1 have no"),
        ({"prompt_mask": mask, "prompt_lengths": [1, 1]}, "give one of them"),
        ({"attention_mask": mask[:, None, None]}, "another form"),
        ({"attention_mask": mask[:, 1:]}, r"expected \[2, 5\]"),
        ({"attention_mask": mask * torch.tensor([[1], [0]])}, "rows 1 have no prompt token"),
    ]
    for changes, said in refused:
        with pytest.raises(PedroError, match=said):
            llama(ids, **({"attention_mask": mask} | changes))


# ---- the cache


def test_vectors_follow_the_rows_of_the_cache(llama: PedroModel) -> None:
    ids = tokens(3, 7)
    changes: list[tuple[Callable[[Any], Any], list[int]]] = [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]
    whole = llama(ids, prompt_lengths=[5] * 3).logits
    for change, rows in changes:
        cache = llama(ids[:, :5], use_cache=True).past_key_values
        original = copy.deepcopy(cache)
        change(cache)
        found = llama(ids[rows, 5:], past_key_values=cache).logits
        assert close(found, whole[rows, 5:])
        # A deep copy has vectors of its own.
        assert close(llama(ids[:, 5:], past_key_values=original).logits, whole[:, 5:])


def test_callers_own_caches() -> None:
    model = make()
    ids = tokens(2, 8)
    whole = model(ids, prompt_lengths=[5, 5]).logits
    config = model.base_model.config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
        model(ids[:, :5], past_key_values=cache)
        assert isinstance(cache, (DynamicCache, StaticCache))
        assert close(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:])
    cache.reset()
    again = model(ids[:, 2:7], past_key_values=cache).logits  # a new prompt, new vectors
    assert close(again, model(ids[:, 2:7]).logits)


def test_second_turn_keeps_the_first_prompts_vectors() -> None:
    model = make()
    ids = tokens(1, 5)
    first = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    runs = count_generator_runs(model)
    extended = torch.cat([first.sequences, tokens(1, 3, seed=8)], dim=1)
    found = model.generate(
        extended, past_key_values=first.past_key_values, max_new_tokens=4, **GREEDY
    )
    assert runs == [0]
    want = model.generate(extended, prompt_lengths=[5], use_cache=False, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, want)


def test_assisted_generation_is_greedy_generation() -> None:
    model = make()
    ids = tokens(1, 4).repeat(1, 3)  # repetitive, so that there is something to look up
    plain = model.generate(ids, max_new_tokens=12, **GREEDY)
    assisted = model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(plain, assisted)


def test_caches_that_cannot_be_continued(llama: PedroModel) -> None:
    ids = tokens(2, 6)
    bare = llama.base_model(ids, use_cache=True).past_key_values
    with pytest.raises(PedroError, match="filled without an adapter"):
        llama(ids[:, :1], past_key_values=bare)
    filled = llama(ids, use_cache=True).past_key_values
    for changes in ({"prompt_lengths": [1, 1]}, {"prompt_mask": torch.ones(2, 1)}):
        with pytest.raises(PedroError, match="filled KV cache"):
            llama(ids[:, :1], past_key_values=filled, **changes)
        with pytest.raises(PedroError, match="filled KV cache"):
            llama.generate(ids, past_key_values=filled, max_new_tokens=1, **changes)
    with pytest.raises(PedroError, match="vectors of 2 sequences, the input has 1"):
        llama(ids[:1, :1], past_key_values=filled)

    two = make()
    two.add_adapter("other", CONFIG)
    cache = two(ids, use_cache=True).past_key_values
    two.set_adapter("other")
    with pytest.raises(PedroError, match="filled with adapter 'default', but 'other'"):
        two(ids[:, :1], past_key_values=cache)


def test_chunked_prefill_is_refused(llama: PedroModel) -> None:
    with pytest.raises(PedroError, match="the prompt has 6 columns"):
        llama.generate(tokens(1, 6), max_new_tokens=2, prefill_chunk_size=4, **GREEDY)
    llama.generate(tokens(1, 6), max_new_tokens=2, prefill_chunk_size=8, **GREEDY)


# ---- adapters


def test_several_adapters() -> None:
    model = make()
    ids = tokens()
    first = model(ids).logits
    model.add_adapter("second", PedroConfig(r=2, pooling="mean"))
    fill(model, "second", seed=5)
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("second")
    second = model(ids).logits
    assert not close(first, second)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.delete_adapter("second")
    assert list(model.pedro_configs) == list(model.vector_generators) == ["default"]
    assert torch.equal(model(ids).logits, first)
    with pytest.raises(PedroError, match="no adapter 'second'; there are 'default'"):
        model.set_adapter("second")
    with pytest.raises(PedroError, match="'default' exists already"):
        model.add_adapter("default", CONFIG)
    with pytest.raises(PedroError, match=r"'a\.b'"):
        model.add_adapter("a.b", CONFIG)
    with pytest.raises(PedroError, match="each of the 3 layers, found 2"):
        model.add_adapter("new", PedroConfig(activation=["gelu", "relu"]))
    assert list(model.pedro_configs) == list(model.vector_generators) == ["default"]
    model.delete_adapter("default")
    with pytest.raises(PedroError, match="no adapter is active"):
        model(ids)


def test_disable_and_enable() -> None:
    model = make()
    ids = tokens()
    adapted, bare = model(ids).logits, model.base_model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, bare)
        with model.enable_adapter():
            assert torch.equal(model(ids).logits, adapted)
        assert torch.equal(model(ids).logits, bare)
    assert torch.equal(model(ids).logits, adapted)
    model.disable_adapter()
    assert torch.equal(model(ids).logits, bare)
    settings = GREEDY | {"max_new_tokens": 4}
    assert torch.equal(model.generate(ids, **settings), model.base_model.generate(ids, **settings))
    model.enable_adapter()
    assert torch.equal(model(ids).logits, adapted)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        PedroConfig(r=0),
        PedroConfig(r=3, activation=["rational", "gelu", "relu"], pooling="max", input_norm="rms"),
        PedroConfig(r=3, activation="gelu", down_bias=True),
    ],
    ids=str,
)
def test_save_and_load(tmp_path: Path, config: PedroConfig) -> None:
    model = make(config=config)
    ids = tokens()
    digest = model.save_pretrained(tmp_path)
    assert digest == load_adapter(tmp_path).digest
    saved = load_adapter(tmp_path, model.shape)
    assert saved.config.inference_mode
    assert saved.tensors.keys() == model.adapter_tensors().keys()
    loaded = PedroModel.from_pretrained(make_backbone(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.save_pretrained(tmp_path / "again") == digest

    trainable = PedroModel.from_pretrained(make_backbone(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == config.num_parameters(model.shape)

    fresh = get_pedro_model(make_backbone(), CONFIG)
    fresh.load_adapter(tmp_path, "saved")
    assert torch.equal(fresh(ids).logits, fresh.base_model(ids).logits)
    fresh.set_adapter("saved")
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_adapter_of_another_backbone(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    other = make_backbone(hidden_size=64)
    with pytest.raises(AdapterError, match="made for another backbone"):
        PedroModel.from_pretrained(other, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters())  # left alone
    with pytest.raises(AdapterError, match="found 3 layers"):
        PedroModel.from_pretrained(make_backbone(num_hidden_layers=2), tmp_path)


def test_saving_notes_the_backbone(tmp_path: Path) -> None:
    model = make()
    model.base_model.config.name_or_path = "some/backbone"
    model.save_pretrained(tmp_path)
    assert PedroConfig.from_pretrained(tmp_path).base_model_name_or_path == "some/backbone"


def test_attributes_are_the_backbones() -> None:
    model = make()
    assert model.config is model.base_model.config
    assert model.device == torch.device("cpu")
    assert model.get_base_model() is model.base_model
    # What a trainer asks for goes on to the backbone. What would be done to it does not.
    for name in ("nonsense", "save_checkpoint", "active_adapters", "merge_adapter", "half_"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'; the backbone is at"):
            getattr(model, name)


def test_what_is_pushed_is_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the backbone, which a user may have to keep to himself."""
    from huggingface_hub import HfApi

    seen: dict[str, Any] = {}

    def upload(self: Any, repo_id: str, folder_path: str, allow_patterns: Any, **how: Any) -> str:
        seen.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
        assert set(seen) <= set(allow_patterns)
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **how: seen.clear())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model = make()
    model.base_model.config.name_or_path = "some/backbone"
    assert model.push_to_hub("me/mine", private=True) == "https://huggingface.co/me/mine/commit/1"
    assert set(seen) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b'base_model: "some/backbone"' in seen["README.md"]
    numbers = sum(t.numel() for t in model.adapter_tensors().values())
    assert 4 * numbers < len(seen["adapter_model.safetensors"]) < 4 * numbers + 10_000


def test_deep_copy_is_independent() -> None:
    model = make()
    ids = tokens()
    other = copy.deepcopy(model)
    before = model(ids).logits
    assert torch.equal(other(ids).logits, before)
    fill(other, seed=9)
    assert torch.equal(model(ids).logits, before)
    assert not close(other(ids).logits, before)


def test_unload(capsys: pytest.CaptureFixture[str]) -> None:
    model = make()
    backbone = model.unload()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in backbone.modules()
    )
    model.print_trainable_parameters()
    count = CONFIG.num_parameters(model.shape)
    assert f"trainable params: {count:,d} || all params: " in capsys.readouterr().out


def test_error_in_the_middle_leaves_nothing_behind() -> None:
    model = make()
    ids = tokens()
    adapted, bare = model(ids).logits, model.base_model(ids).logits

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    handle = model.base_model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids)
    handle.remove()
    assert torch.equal(model.base_model(ids).logits, bare)
    assert torch.equal(model(ids).logits, adapted)


# ---- architectures that are refused


def test_unknown_architectures_are_refused_and_left_alone() -> None:
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_inner": 48}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    gpt2.config.intermediate_size = 48
    gpt2.config.model_type = "unheard-of"
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    )
    fused = make_backbone("Phi3")
    fused.config.model_type = "unheard-of"
    for model, said in (
        (gpt2, r"decoder layer 0: expected .*'q_proj': 32.* found .*'q_proj': 0.*'attn.c_attn'"),
        (mamba, "'num_attention_heads'"),
        (fused, r"decoder layer 0: .* found .*'q_proj': 0.*'self_attn.qkv_proj'"),
    ):
        with pytest.raises(PedroError, match=said):
            get_pedro_model(model, CONFIG)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_widths_that_differ_from_the_config_are_refused() -> None:
    model = make_backbone()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(
        PedroError, match=r"layer 1: expected .*'up_proj': 48.* found .*'up_proj': 40"
    ):
        get_pedro_model(model, CONFIG)


def test_projection_that_is_never_used_is_noticed() -> None:
    model = make()
    layer = model.base_model.model.layers[2]
    layer.mlp.forward = lambda x: layer.mlp.down_proj(layer.mlp.up_proj(x))
    with pytest.raises(PedroError, match=r"layer 2: expected one use of each"):
        model(tokens())
    model = make()
    model.base_model.model.layers[1].forward = lambda x, **_: x
    with pytest.raises(PedroError, match="layer 1: expected one use"):
        model(tokens())


def test_layer_that_never_sees_the_adapter_is_noticed() -> None:
    model = make()
    model.base_model.model.config.num_hidden_layers = 2  # the loop stops early
    with pytest.raises(PedroError, match="layers 2 never saw the adapter"):
        model(tokens(), use_cache=False)


# ---- training


def gradients(model: PedroModel, **how: Any) -> dict[str, Tensor]:
    model.zero_grad()
    ids = tokens()
    model(ids, labels=ids, prompt_lengths=[5, 4], **how).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


@pytest.mark.usefixtures("gradients_on")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_every_generator(name: str) -> None:
    model = make(name).train()
    plain = gradients(model)
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 5
    assert all("vector_generators.default" in key for key in trainable)
    assert plain.keys() == set(trainable)
    assert all(bool(gradient.any()) for gradient in plain.values())

    for reentrant in (False, True):
        checkpointed = make(name).train()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients(checkpointed, use_cache=False)
        assert found.keys() == plain.keys()
        for key, gradient in plain.items():
            assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-8), key


@pytest.mark.usefixtures("gradients_on")
def test_checkpointed_passes_may_overlap() -> None:
    """The second forward pass must not change what the first one runs again."""
    model = make().train()
    model.gradient_checkpointing_enable()
    plain = make().train()
    ids, more = tokens(), tokens(seed=7)

    def both(one: PedroModel) -> list[Tensor]:
        first = one(ids, labels=ids, prompt_lengths=[5, 4], use_cache=False).loss
        second = one(more, labels=more, prompt_lengths=[2, 3], use_cache=False).loss
        with torch.no_grad(), one.disable_adapter():
            one(ids, use_cache=False)
        (first - 2 * second).backward()
        return [p.grad for p in one.parameters() if p.grad is not None]

    for found, want in zip(both(model), both(plain), strict=True):
        assert torch.allclose(found, want, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("gradients_on")
def test_training_lowers_the_loss() -> None:
    model = get_pedro_model(make_backbone(), PedroConfig(r=4, input_norm="rms")).train()
    frozen = {key: p.clone() for key, p in model.base_model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    ids = tokens(4, 8)
    labels = ids.masked_fill(torch.arange(8) < 5, -100)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=labels, prompt_lengths=[5] * 4).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, frozen[key]) for key, p in model.base_model.named_parameters())


@pytest.mark.usefixtures("gradients_on")
def test_set_adapter_trains_only_the_active_one() -> None:
    model = make()
    model.add_adapter("second", PedroConfig(r=2))
    model.add_adapter("finished", PedroConfig(r=2, inference_mode=True))
    for name, trains in (("second", ["second"]), ("default", ["default"]), ("finished", [])):
        model.set_adapter(name)
        found = {key.split(".")[1] for key, p in model.named_parameters() if p.requires_grad}
        assert sorted(found) == trains


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_backbone(dtype: torch.dtype) -> None:
    backbone = make_backbone().to(dtype)
    ids = tokens()
    bare = backbone(ids).logits
    model = get_pedro_model(backbone, CONFIG)
    assert {p.dtype for p in model.vector_generators.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, bare)
    fill(model)
    found = model(ids)
    assert found.logits.dtype == dtype
    carried = found.past_key_values.pedro_vectors.layers
    assert {v.dtype for layer in carried.values() for v in layer.values()} == {torch.float32}
    exact = make()(ids).logits
    assert (found.logits.float() - exact).abs().max() < 0.1 * (bare.float() - exact).abs().max()


def test_autocast_leaves_the_vectors_in_float32(llama: PedroModel) -> None:
    ids = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = llama(ids, use_cache=True).past_key_values
    plain = llama(ids, use_cache=True).past_key_values
    for name, vector in cache.pedro_vectors.layers[0].items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, plain.pedro_vectors.layers[0][name])


def test_shape_is_the_configs(llama: PedroModel) -> None:
    assert llama.shape == BackboneShape(
        3, 32, {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 48, "up_proj": 48}
    )


# ---- prompts that end where labels begin


def test_prompt_ends_where_labels_begin(llama: PedroModel) -> None:
    ids, mask = pad([[5, 6, 7, 8, 9], [8, 9, 4]], "left")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :-2] = -100  # three prompt tokens
    labels[1, :-1] = -100  # two
    found = llama(ids, attention_mask=mask, labels=labels)
    want = llama(ids, attention_mask=mask, labels=labels, prompt_lengths=[3, 2])
    whole = llama(ids, attention_mask=mask)
    assert torch.equal(found.logits, want.logits)
    assert torch.equal(found.loss, want.loss)
    assert not close(found.logits, whole.logits)
    # What is said explicitly goes before what labels tell.
    told = llama(ids, attention_mask=mask, labels=labels, prompt_mask=mask.bool())
    assert torch.equal(told.logits, whole.logits)
    unlabelled = llama(ids, attention_mask=mask, labels=torch.full_like(labels, -100))
    assert torch.equal(unlabelled.logits, whole.logits)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_labels_without_a_prompt_are_refused(llama: PedroModel, packed: bool) -> None:
    """What the first token alone makes is nothing that serving makes; told so, it is taken."""
    if packed:
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        where = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        labels = torch.tensor([[-100, 6, 7, 8, 9]])
    else:
        ids, mask = pad([[5, 6, 7], [8, 9]], "left")
        where = {"attention_mask": mask}
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 0] = -100
    ways = "'prompt' and 'completion' columns, or assistant_only_loss=True.*or say with prompt_l"
    with pytest.raises(PedroError, match=f"labels begin at the first token.*{ways}"):
        llama(ids, labels=labels, **where)
    assert llama(ids, labels=labels, prompt_lengths=[1, 1], **where).loss.isfinite()


def test_labels_beside_a_filled_cache_say_nothing_about_prompts(llama: PedroModel) -> None:
    ids = tokens(1, 8)
    cache = llama(ids[:, :5], use_cache=True).past_key_values
    found = llama(ids[:, 5:], labels=ids[:, 5:], past_key_values=cache).logits
    assert close(found, llama(ids, prompt_lengths=[5]).logits[:, 5:])


# ---- packed sequences

SEQUENCES = ([5, 6, 7, 8, 9, 10, 11], [8, 9, 4, 5], [12, 13, 14, 15, 16])
LENGTHS = (4, 1, 3)


def pack() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[token for row in SEQUENCES for token in row]]),
        "position_ids": torch.tensor([[i for row in SEQUENCES for i in range(len(row))]]),
    }


def separate(model: PedroModel) -> Tensor:
    """Logits of the sequences one by one, one behind the other, `[T, vocabulary]`."""
    pairs = zip(SEQUENCES, LENGTHS, strict=True)
    alone = [model(torch.tensor([row]), prompt_lengths=[n]).logits[0] for row, n in pairs]
    return torch.cat(alone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_packed_is_separate(name: str, implementation: str) -> None:
    model = make(name, attn_implementation=implementation)
    found = model(**pack(), prompt_lengths=list(LENGTHS)).logits[0]
    assert close(found, separate(model))
    assert not close(found, model(**pack()).logits[0])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("norm", INPUT_NORMS)
@pytest.mark.parametrize("r", [0, 4])
def test_packed_pooling(pooling: str, norm: str | None, r: int) -> None:
    model = make(config=PedroConfig(r=r, pooling=pooling, input_norm=norm))
    packed = pack()
    want = separate(model)
    assert close(model(**packed, prompt_lengths=list(LENGTHS)).logits[0], want)
    places = packed["position_ids"]
    ends = torch.tensor([n for n, row in zip(LENGTHS, SEQUENCES, strict=True) for _ in row])
    mask = places < ends
    assert close(model(**packed, prompt_mask=mask).logits[0], want)
    labels = packed["input_ids"].masked_fill(mask, -100)
    assert close(model(**packed, labels=labels).logits[0], want)


def test_packed_rows_beside_each_other(llama: PedroModel) -> None:
    ids = torch.tensor([[*SEQUENCES[0], *SEQUENCES[1]], [*SEQUENCES[2], 3, 4, 5, 6, 7, 8]])
    places = torch.tensor([[*range(7), *range(4)], [*range(5), *range(6)]])
    found = llama(ids, position_ids=places, prompt_lengths=[4, 1, 3, 2]).logits
    alone = llama(torch.tensor([SEQUENCES[1]]), prompt_lengths=[1]).logits[0]
    assert close(found[0, 7:], alone)
    last = llama(ids[1:, 5:], prompt_lengths=[2]).logits[0]
    assert close(found[1, 5:], last)


def test_packed_prompts_that_cannot_be(llama: PedroModel) -> None:
    packed = pack()
    empty = torch.ones_like(packed["input_ids"], dtype=torch.bool)
    empty[0, 7:11] = False
    for changes, said in (
        ({"prompt_lengths": [1, 1]}, "each of the 3 packed sequences, found 2"),
        ({"prompt_lengths": [8, 1, 1]}, r"\[7, 4, 5\], found \[8, 1, 1\]"),
        ({"prompt_mask": empty}, "packed sequences 1 have no prompt token"),
        ({"prompt_mask": empty[:, 1:]}, r"prompt_mask: expected \[1, 16\]"),
        ({"use_cache": True}, "no KV cache"),
    ):
        with pytest.raises(PedroError, match=said):
            llama(**packed, **changes)


# ---- the state dict


def test_state_dict_is_the_adapters_alone() -> None:
    model = make()
    model.add_adapter("other", PedroConfig(r=0))
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"vector_generators"}
    assert len(state) == len(model.adapter_tensors()) + len(model.adapter_tensors("other"))
    fresh = get_pedro_model(make_backbone(), CONFIG)
    fresh.add_adapter("other", PedroConfig(r=0))
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(state)
    # The backbone's own is whole.
    assert set(model.base_model.state_dict()) == set(make_backbone().state_dict())
