import random
import time

import numpy as np
import pytest
import torch
from banks import CPU, LIMITS, SHAPE, reader, write
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_pedro.adapter import load_adapter, read_adapter
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.config import ACTIVATIONS, POOLINGS, PedroConfig
from vllm_pedro.errors import AdapterError
from vllm_pedro.ops.layout import read_record
from vllm_pedro.places import modules_of
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
from vllm_pedro.serving.blobs import blob_bytes


def cache(capacity, limits=LIMITS):
    return HostCache(capacity, reader(limits))


def bank(largest=2, limits=LIMITS, host=4, max_adapters=None):
    """With room for so many of the largest adapters, with a host memory of its own or without."""
    nbytes = largest * limits.largest_blob
    own = cache(host, limits) if host else None
    return AdapterBank(nbytes, reader(limits), CPU, own, max_adapters)


def test_host_cache_drops_the_least_recently_used(tmp_path):
    specs = [write(tmp_path / str(i), seed=i) for i in range(3)]
    host = cache(2)
    host.get(specs[0])
    host.get(specs[1])
    first = host.get(specs[0])
    host.get(specs[2])
    assert specs[0].digest in host
    assert specs[1].digest not in host
    assert host.get(specs[0]) is first
    assert len(host) == 2


def test_same_content_under_two_names_is_one_adapter(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert one.digest == two.digest
    host = cache(4)
    assert host.get(one) is host.get(two)


def test_changed_folder_is_refused_not_served(tmp_path):
    old = write(tmp_path / "x", seed=0)
    write(tmp_path / "x", seed=1)
    host = cache(2)
    with pytest.raises(AdapterError, match="changed"):
        host.get(old)
    assert len(host) == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (AdapterLimits(SHAPE, 2), r"r is 4, .* at most 2: .*--max-pedro-rank 4"),
        (AdapterLimits(SHAPE, 4, ("v_proj",)), r"has q_proj, up_proj, .* pedro_target_modules"),
    ],
)
def test_limits_name_the_option(tmp_path, limits, message):
    with pytest.raises(AdapterError, match=message):
        cache(2, limits).get(write(tmp_path / "x"))


ALL_MODULES = {"target_modules": list(TARGET_MODULES)}
TIERS = pytest.mark.parametrize("host", [None, 4])


@TIERS
def test_bank_evicts_the_least_recently_used_but_never_what_the_step_reads(tmp_path, host):
    specs = [write(tmp_path / str(i), seed=i, **ALL_MODULES) for i in range(4)]
    adapters = bank(2, host=host)

    def resident(index, keep=()):
        adapters.make_resident(specs[index], {specs[i].digest for i in (*keep, index)})
        return adapters.place_of(specs[index].digest)

    first, second = resident(0), resident(1)
    assert first != second
    assert resident(0) == first
    assert resident(2) == second
    assert specs[1].digest not in adapters
    assert resident(3, keep=(0,)) == second
    assert specs[0].digest in adapters
    with pytest.raises(RuntimeError, match=r"take more than the \d+ bytes"):
        resident(1, keep=(0, 3))


@TIERS
def test_a_failed_load_leaves_the_bank_as_it_was(tmp_path, host):
    spec, gone = write(tmp_path / "x", **ALL_MODULES), write(tmp_path / "y", seed=1, **ALL_MODULES)
    adapters = bank(1, host=host)
    adapters.make_resident(spec, ())
    (tmp_path / "y" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model"):
        adapters.make_resident(gone, {gone.digest})
    assert spec.digest in adapters


def test_where_the_arena_is_host_memory_the_number_of_adapters_has_a_limit(tmp_path):
    """Which gives way to what a step reads."""
    specs = [write(tmp_path / str(i), seed=i) for i in range(4)]
    adapters = bank(9, host=None, max_adapters=2)
    for spec in specs[:3]:
        adapters.make_resident(spec, {spec.digest})
    assert [spec.digest in adapters for spec in specs] == [False, True, True, False]
    for spec in specs:
        adapters.make_resident(spec, {spec.digest for spec in specs})
    assert adapters.resident == {"device": 4, "host": 4}
    adapters.discard(specs[0].digest)
    adapters.make_resident(specs[0], {specs[0].digest})
    assert len(adapters) == 2


def test_the_budget_is_in_bytes_and_small_adapters_take_less_of_it(tmp_path):
    half = {"dtype": torch.bfloat16, "r": 2, "target_modules": ["v_proj"]}
    specs = [write(tmp_path / str(i), seed=i, **half) for i in range(12)]
    adapters = bank(2)
    for spec in specs:
        adapters.make_resident(spec, {spec.digest})
    config = PedroConfig(r=2, target_modules=["v_proj"])
    each = blob_bytes(config, "bfloat16", SHAPE)
    assert each < LIMITS.largest_blob / 2
    assert len(adapters) == 2 * LIMITS.largest_blob // each > 4
    assert adapters.used_bytes == len(adapters) * each


class Copies(TorchDispatchMode):
    """The bytes of each operator's last argument, and the seconds that all of them took."""

    def __init__(self):
        super().__init__()
        self.copied = []
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - start
        if func is torch.ops.aten.copy_.default:
            self.copied.append(args[1].nbytes)
        return result


def test_a_swap_is_one_copy_of_the_adapters_own_bytes(tmp_path, monkeypatch):
    """With the shape of Llama-3-8B: 18 MiB, and less than 0.5 ms of the step's thread beside."""
    widths = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "gate_proj": 14336, "up_proj": 14336}
    limits = AdapterLimits(BackboneShape(32, 4096, widths), 12)
    large, small = (write(tmp_path / str(r), 0, limits.shape, torch.bfloat16, r=r) for r in (12, 0))
    host = cache(2, limits)
    size = len(host.get(large).data)
    host.get(small)
    assert 18 << 20 < size < 19 << 20
    bank = AdapterBank(size + 256, reader(limits), CPU, host)
    monkeypatch.setattr(AdapterReader, "pack", None)
    rest = []
    for _ in range(8):
        bank.make_resident(small, keep=())
        with Copies() as copies:
            start = time.perf_counter()
            assert bank.make_resident(large, keep=()) == "host"
            rest.append(time.perf_counter() - start - copies.seconds)
        assert copies.copied == [size]
    assert min(rest) < 5e-4, rest


def test_the_largest_blob_is_that_of_the_largest_adapter():
    config = PedroConfig(r=4, target_modules=list(TARGET_MODULES))
    assert blob_bytes(config, "float32", SHAPE) == LIMITS.largest_blob
    assert blob_bytes(config, "float16", SHAPE) < LIMITS.largest_blob


def check_blob(adapters, spec):
    """The resident adapter is bit for bit what is in its folder."""
    adapter, columns = load_adapter(spec.path), adapters.reader._columns
    config, shape = adapter.config, adapters.reader.limits.shape
    assert adapters.rank_of(spec.digest) == config.r
    for i in range(shape.num_layers):
        record = read_record(adapters.arena, adapters.place_of(spec.digest), i)
        weights = adapter.layer(i)
        assert record.activation == config.activation_of(i)
        assert (record.pooling, record.input_norm) == (config.pooling, config.input_norm)
        here = [range(c, c + w) for c, w in record.ranges]
        assert here == sorted(here, key=lambda r: r.start)
        store = torch.full((48,), -1)
        store[torch.tensor([c for r in here for c in r])] = torch.arange(sum(map(len, here)))
        start = 0
        for module, width in zip(
            config.target_modules, shape.split_widths(config.target_modules), strict=True
        ):
            number = TARGET_MODULES.index(module)
            own = store[np.flatnonzero(modules_of(columns.layers[i]) == number)]
            assert torch.equal(record.bias[own].float(), weights.bias[start : start + width])
            if weights.up is not None:
                up = record.up[:, own].float().t()
                assert torch.equal(up, weights.up[start : start + width])
            start += width
        assert int((store >= 0).sum()) == start == len(record.bias)
        if weights.down_bias is None:
            assert not record.down_bias.any()
        else:
            assert torch.equal(record.down_bias, weights.down_bias)
            assert record.down_bias.all()
        if weights.down is None:
            assert len(record.down) == 0
        else:
            assert torch.equal(record.down.float(), weights.down)
        if weights.numerator is not None:
            assert torch.equal(record.numerator, weights.numerator)
            assert torch.equal(record.denominator, weights.denominator)


@TIERS
def test_blobs_are_their_adapters_bit_by_bit_whatever_lay_there_before(tmp_path, host):
    """Adapters of all sizes and dtypes in an arena of few, moved about in it."""
    shape = BackboneShape(12, 8, SHAPE.widths)
    draw, specs = random.Random(0), []
    for i in range(24):
        specs.append(
            write(
                tmp_path / str(i),
                seed=i,
                shape=shape,
                dtype=draw.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
                r=draw.choice([0, 2, 6]),
                target_modules=draw.sample(TARGET_MODULES, draw.choice([1, 2, 5])),
                activation=draw.choice(["rational", "gelu", draw.choices(ACTIVATIONS, k=12)]),
                rational_order=(draw.randint(1, 6), draw.randint(1, 6)),
                pooling=draw.choice(POOLINGS),
                input_norm=draw.choice([None, "rms"]),
                down_bias=draw.choice([False, True]),
            )
        )
    limits = AdapterLimits(shape, 6)
    adapters = bank(2, limits, host=host)
    adapters.MOVED_BYTES = 999
    adapters.arena.fill_(0xFF)
    moves = []
    compact = adapters._spans.compact
    adapters._spans.compact = lambda: moves.append(compact()) or moves[-1]
    for _ in range(60):
        step = draw.sample(specs, draw.randint(1, 4))
        sizes = [blob_bytes((a := read_adapter(spec.path)).config, a.dtype, shape) for spec in step]
        while sum(sizes) > adapters.nbytes:
            step.pop(), sizes.pop()
        for spec in step:
            adapters.make_resident(spec, {spec.digest for spec in step})
        for spec in step:
            check_blob(adapters, spec)
    assert sum(map(len, moves)) > 3
