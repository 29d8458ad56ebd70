import pytest
import torch

from vllm_pedro.adapter import init_adapter, save_adapter
from vllm_pedro.config import BackboneShape, PedroConfig
from vllm_pedro.errors import AdapterError
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, HostCache
from vllm_pedro.serving.spec import RequestSpec
from vllm_pedro.serving.vectors import VectorStore

SHAPE = BackboneShape(2, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
LIMITS = AdapterLimits(SHAPE, 4)


def write(folder, seed=0, **config):
    adapter = init_adapter(PedroConfig(**{"r": 4, **config}), SHAPE, seed=seed, scale=0.1)
    digest = save_adapter(folder, adapter.config, adapter.tensors)
    return RequestSpec(folder.name, str(folder), digest, 5, "prompt")


def bank(slots=2, limits=LIMITS):
    store = VectorStore(SHAPE, limits.modules, 2, 8, torch.float32, torch.device("cpu"))
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
    weights = adapter.layer(1)
    assert torch.equal(slots.bias[1][slot][slots.columns["up_proj"]], weights.bias[:16])
    assert torch.equal(slots.bias[1][slot][slots.columns["q_proj"]], weights.bias[16:])
    assert torch.equal(slots.up[1][slot][slots.columns["q_proj"]], weights.up[16:])
