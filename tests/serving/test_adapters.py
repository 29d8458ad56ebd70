import random

import pytest
import torch

from vllm_pedro.adapter import init_adapter, load_adapter, save_adapter
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import PedroConfig
from vllm_pedro.errors import AdapterError
from vllm_pedro.ops.layout import ACTIVATIONS, POOLINGS
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, HostCache
from vllm_pedro.serving.spec import RequestSpec
from vllm_pedro.serving.store import VectorStore

SHAPE = BackboneShape(2, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
LIMITS = AdapterLimits(SHAPE, 4)


def write(folder, seed=0, shape=SHAPE, dtype=None, **config):
    adapter = init_adapter(PedroConfig(**{"r": 4, **config}), shape, seed=seed, scale=0.1)
    digest = save_adapter(folder, adapter.config, adapter.tensors, dtype)
    return RequestSpec(folder.name, str(folder), digest, 5, "prompt")


def bank(slots=2, limits=LIMITS):
    store = VectorStore(limits.shape, limits.modules, 2, 8, torch.float32, torch.device("cpu"))
    return AdapterBank(slots, limits, store.columns, torch.device("cpu"))


def test_host_cache_drops_the_least_recently_used(tmp_path):
    specs = [write(tmp_path / str(i), seed=i) for i in range(3)]
    cache = HostCache(2, LIMITS)
    cache.get(specs[0])
    cache.get(specs[1])
    first = cache.get(specs[0])
    cache.get(specs[2])
    assert specs[0].digest in cache
    assert specs[1].digest not in cache
    assert cache.get(specs[0]) is first
    assert len(cache) == 2


def test_same_content_under_two_names_is_one_adapter(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert one.digest == two.digest
    cache = HostCache(4, LIMITS)
    assert cache.get(one) is cache.get(two)


def test_changed_folder_is_refused_not_served(tmp_path):
    old = write(tmp_path / "x", seed=0)
    write(tmp_path / "x", seed=1)
    cache = HostCache(2, LIMITS)
    with pytest.raises(AdapterError, match="changed"):
        cache.get(old)
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (AdapterLimits(SHAPE, 2), r"r is 4, .* at most 2: .*--max-pedro-rank 4"),
        (AdapterLimits(SHAPE, 4, ("v_proj",)), r"has q_proj, up_proj, .* pedro_target_modules"),
    ],
)
def test_limits_name_the_option(tmp_path, limits, message):
    with pytest.raises(AdapterError, match=message):
        HostCache(2, limits).get(write(tmp_path / "x"))


def test_bank_evicts_the_least_recently_used_but_never_what_the_step_reads(tmp_path):
    specs = [write(tmp_path / str(i), seed=i) for i in range(4)]
    cache, slots = HostCache(4, LIMITS), bank(2)

    def resident(index, keep=()):
        spec = specs[index]
        keep = {specs[i].digest for i in (*keep, index)}
        return slots.make_resident(spec.digest, lambda: cache.get(spec), keep)

    first, second = resident(0), resident(1)
    assert {first, second} == {0, 1}
    assert resident(0) == first
    assert resident(2) == second
    assert specs[1].digest not in slots
    assert resident(3, keep=(0,)) == second
    assert specs[0].digest in slots
    with pytest.raises(RuntimeError, match="more than the 2 adapters"):
        resident(1, keep=(0, 3))


def test_a_failed_load_leaves_the_bank_as_it_was(tmp_path):
    spec = write(tmp_path / "x")
    slots = bank(1)
    slots.make_resident(spec.digest, lambda: HostCache(1, LIMITS).get(spec), set())

    def broken():
        raise AdapterError("gone")

    with pytest.raises(AdapterError, match="gone"):
        slots.make_resident("other", broken, {"other"})
    assert spec.digest in slots


def test_untargeted_modules_yield_exactly_one_after_a_larger_adapter_left(tmp_path):
    everything = write(tmp_path / "all", target_modules=list(LIMITS.modules))
    only_v = write(tmp_path / "v", r=2, target_modules=["v_proj"])
    cache, slots = HostCache(2, LIMITS), bank(1)
    slots.make_resident(everything.digest, lambda: cache.get(everything), set())
    slot = slots.make_resident(only_v.digest, lambda: cache.get(only_v), set())
    keep = torch.ones(48, dtype=torch.bool)
    keep[slots.columns["v_proj"]] = False
    for layer in range(2):
        assert bool((slots.up[layer][slot][keep] == 0).all())
        assert bool((slots.bias[layer][slot][keep] == 1).all())
        assert bool((slots.up[layer][slot][~keep][:, :2] != 0).any())


def test_split_order_of_the_config_is_followed(tmp_path):
    spec = write(tmp_path / "x", target_modules=["up_proj", "q_proj"])
    adapter = HostCache(1, LIMITS).get(spec)
    slots = bank(1)
    slot = slots.make_resident(spec.digest, lambda: adapter, set())
    weights = load_adapter(spec.path).layer(1)
    assert torch.equal(slots.bias[1][slot][slots.columns["up_proj"]], weights.bias[:16])
    assert torch.equal(slots.bias[1][slot][slots.columns["q_proj"]], weights.bias[16:])
    assert torch.equal(slots.up[1][slot][slots.columns["q_proj"]], weights.up[16:])


def rows_of(spec, slots):
    """What a slot should hold, tensor by tensor: ``[layers, row]``."""
    adapter, at = load_adapter(spec.path), slots.layout
    config, shape = adapter.config, slots.limits.shape
    rows = at.empty(shape.num_layers, torch.device("cpu"))
    views = at.views(rows)
    for i in range(shape.num_layers):
        weights, start = adapter.layer(i), 0
        for module, width in zip(
            config.target_modules, shape.split_widths(config.target_modules), strict=True
        ):
            here, columns = slice(start, start + width), slots.columns[module]
            views.bias[i, columns] = weights.bias[here]
            if weights.up is not None:
                views.up[i, columns, : config.r] = weights.up[here]
            start += width
        if weights.down is not None:
            views.down[i, : config.r] = weights.down
        m, n = config.rational_order
        if weights.numerator is not None:
            views.numerator[i, : m + 1] = weights.numerator
            views.denominator[i, :n] = weights.denominator
        kinds = (ACTIVATIONS.index(config.activation_of(i)), POOLINGS.index(config.pooling))
        norm = config.input_norm is not None
        views.header[i, :6] = torch.tensor([kinds[0], config.r, m, n, kinds[1], norm])
    return rows


class Staging:
    """Buffers on the way to a device, as on CUDA: two in turns, with garbage in them at first."""

    def __init__(self, layers, record):
        self.buffers = [(i, torch.full((layers, record), torch.nan)) for i in range(2)]

    def staging(self):
        return self.buffers[0]

    def send(self, packed, generators, slot):
        for layer, target in enumerate(generators):
            target[slot].copy_(packed[layer])
        self.buffers.append(self.buffers.pop(0))


@pytest.mark.parametrize("staged", [False, True])
def test_a_slot_holds_its_adapter_bit_by_bit_whatever_it_held_before(tmp_path, staged):
    shape = BackboneShape(12, 8, SHAPE.widths)
    draw, specs = random.Random(0), []
    for i in range(24):
        specs.append(
            write(
                tmp_path / str(i),
                seed=i,
                shape=shape,
                dtype=draw.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
                r=draw.choice([0, 2, 4]),
                target_modules=draw.sample(TARGET_MODULES, draw.choice([1, 2, 5])),
                activation=draw.choice(["rational", "gelu", draw.choices(ACTIVATIONS, k=12)]),
                rational_order=(draw.randint(1, 6), draw.randint(1, 6)),
                pooling=draw.choice(POOLINGS),
                input_norm=draw.choice([None, "rms"]),
            )
        )
    # Alike in rank, modules and dtype: then only what differs is written.
    alike = {"shape": shape, "target_modules": ["v_proj", "k_proj"], "dtype": torch.bfloat16}
    specs += [write(tmp_path / f"alike-{i}", seed=i, **alike) for i in range(3)]
    specs += [write(tmp_path / f"gelu-{i}", seed=i, activation="gelu", **alike) for i in range(3)]
    limits = AdapterLimits(shape, 6)
    cache, slots = HostCache(4, limits), bank(2, limits)
    if staged:
        slots._on_host, slots._copies = None, Staging(12, slots.layout.record)
    for step in range(120):
        spec = draw.choice(specs if step % 40 < 25 else specs[-6:])
        slot = slots.make_resident(spec.digest, lambda spec=spec: cache.get(spec), {spec.digest})
        found = torch.stack([layer[slot] for layer in slots.generators])
        assert torch.equal(found.view(torch.int32), rows_of(spec, slots).view(torch.int32))
