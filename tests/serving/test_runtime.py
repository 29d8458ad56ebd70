import itertools

import pytest
import torch

from vllm_pedro.adapter import init_adapter, save_adapter
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.bench.adapters import store_columns
from vllm_pedro.config import PedroConfig
from vllm_pedro.generator import VectorGenerator
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
from vllm_pedro.serving.rows import VectorRows
from vllm_pedro.serving.runtime import PedroRuntime
from vllm_pedro.serving.spec import RequestSpec
from vllm_pedro.serving.store import VectorStore

SHAPE = BackboneShape(3, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
LIMITS = AdapterLimits(SHAPE, 6)
VARIANTS = [
    {
        "pooling": pooling,
        "activation": activation,
        "input_norm": norm,
        "r": r,
        "down_bias": (norm is None) == (pooling == "mean"),
    }
    for pooling, activation, norm, r in itertools.product(
        ("last", "mean", "max"),
        ("rational", "gelu", ["relu", "rational", "gelu"]),
        (None, "rms"),
        (0, 2, 6),
    )
]


class Harness(PedroRuntime):
    """A runtime with the scheduler's part of the work."""

    def __init__(self, *args, sequences):
        super().__init__(*args)
        self._owners = VectorRows(sequences)

    def enter(self, name, spec):
        self.admit(name, spec)
        self.resume(name)

    def resume(self, name):
        assignment = self._owners.acquire(name, self._specs[name].vector_key, "")
        self.assign({name: assignment})
        self._owners.confirm(assignment)

    def leave(self, *names):
        for name in names:
            self._owners.free(name)
        self.finish(names)

    def row(self, name):
        return self.row_of(name)

    def prepare(self, *rows):
        """Rows as (request, tokens, computed before)."""
        self.prepare_step(*([row[i] for row in rows] for i in range(3)))


def request(folder, digest, length, prompt="p"):
    return RequestSpec(folder.name, str(folder), digest, length, prompt)


def runtime(largest=4, sequences=4, dtype=torch.float32, has_host=False):
    """With room for so many of the largest adapters, and a host memory of its own if asked."""
    cpu = torch.device("cpu")
    store = VectorStore(store_columns(SHAPE, TARGET_MODULES), sequences, 64, dtype, cpu)
    reader = AdapterReader(LIMITS, store.columns)
    host = HostCache(8, reader) if has_host else None
    bank = AdapterBank(largest * LIMITS.largest_blob, reader, cpu, host)
    return Harness(bank, store, sequences=sequences)


def write(folder, seed=0, **config):
    adapter = init_adapter(PedroConfig(**{"r": 4, **config}), SHAPE, seed=seed, scale=0.3)
    digest = save_adapter(folder, adapter.config, adapter.tensors)
    return adapter, digest


def expected(adapter, layer, prompt):
    """What the training module makes of the same prompt less 1, as the store has it."""
    generator = VectorGenerator(adapter.config, SHAPE, layer)
    prefix = f"base_model.model.model.layers.{layer}.vector_generator."
    generator.load_state_dict(
        {k.removeprefix(prefix): v for k, v in adapter.tensors.items() if k.startswith(prefix)}
    )
    parts = generator(prompt)
    vectors = [parts.get(m, torch.ones(SHAPE.widths[m])) for m in TARGET_MODULES]
    return torch.cat(vectors).detach() - 1


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("modules", [["q_proj", "v_proj", "up_proj"], ["gate_proj", "k_proj"]])
def test_vectors_equal_the_training_module(tmp_path, variant, modules):
    adapter, digest = write(tmp_path / "x", target_modules=modules, **variant)
    rt = runtime()
    rt.enter("a", request(tmp_path / "x", digest, 5))
    rt.prepare(("base", 3, 0), ("a", 7, 0))
    assert rt.generates_vectors
    hidden = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)) * 3
    slot = rt.row("a")
    for layer in range(3):
        rt.layers[layer].generate(hidden)
        torch.testing.assert_close(
            rt.store.vectors[layer][slot], expected(adapter, layer, hidden[3:8])
        )
        others = [i for i in range(5) if i != slot]
        assert not rt.store.vectors[layer][others].any()


def test_rows_of_several_adapters_in_one_step(tmp_path):
    rt = runtime()
    made = {}
    for name, seed, length in (("a", 0, 2), ("b", 1, 4), ("c", 0, 1)):
        adapter, digest = write(tmp_path / name, seed=seed, pooling="mean")
        rt.enter(name, request(tmp_path / name, digest, length, prompt=name))
        made[name] = adapter
    rt.prepare(("a", 2, 0), ("b", 4, 0), ("c", 1, 0))
    # a and c have the same content and lie side by side.
    assert len(rt.bank) == 2
    slots = rt.store.prefills[:3, 3].tolist()
    assert slots == sorted(slots)
    assert rt.store.counts.tolist() == [3, 3, 4]
    hidden = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    rt.layers[0].generate(hidden)
    for name, rows in (("a", slice(0, 2)), ("b", slice(2, 6)), ("c", slice(6, 7))):
        torch.testing.assert_close(
            rt.store.vectors[0][rt.row(name)], expected(made[name], 0, hidden[rows])
        )


def test_decode_steps_and_dummy_runs_make_nothing(tmp_path):
    _, digest = write(tmp_path / "x")
    rt = runtime()
    rt.enter("a", request(tmp_path / "x", digest, 2))
    rt.prepare(("a", 2, 0))
    rt.layers[0].generate(torch.randn(2, 8))
    kept = rt.store.vectors[0].clone()
    rt.prepare(("a", 1, 2))
    assert not rt.generates_vectors
    assert rt.store.token_rows[0] == rt.row("a")
    rt.clear_step()
    assert bool((rt.store.token_rows == 0).all())
    rt.layers[0].generate(torch.randn(2, 8))
    assert torch.equal(rt.store.vectors[0], kept)


def test_kept_vectors_are_not_made_again(tmp_path):
    adapter, digest = write(tmp_path / "x")
    rt = runtime(sequences=2)
    spec = request(tmp_path / "x", digest, 2)
    rt.enter("a", spec)
    rt.prepare(("a", 2, 0))
    hidden = torch.full((2, 8), 2.0)
    rt.layers[0].generate(hidden)
    rt.leave("a")
    rt.enter("b", spec)
    rt.prepare(("b", 1, 1))
    assert not rt.generates_vectors
    torch.testing.assert_close(rt.store.vectors[0][rt.row("b")], expected(adapter, 0, hidden))


def test_preempted_requests_resume(tmp_path):
    _, digest = write(tmp_path / "x")
    rt = runtime(sequences=1)
    rt.enter("a", request(tmp_path / "x", digest, 2, prompt="one"))
    rt.prepare(("a", 2, 0))
    rt._owners.free("a")
    rt.enter("b", request(tmp_path / "x", digest, 2, prompt="two"))
    rt.prepare(("b", 2, 0))
    rt.leave("b", "unknown")
    rt.resume("a")
    rt.prepare(("a", 4, 0))
    assert rt.generates_vectors
    assert rt.row("a") == 1


@pytest.mark.parametrize("has_host", [False, True])
def test_more_tenants_than_fit_the_device(tmp_path, has_host):
    rt = runtime(largest=1, sequences=3, has_host=has_host)
    adapters = {}
    for i, name in enumerate("abc"):
        adapters[name], digest = write(tmp_path / name, seed=i)
        rt.enter(name, request(tmp_path / name, digest, 2, prompt=name))
        rt.prepare((name, 2, 0))
        assert len(rt.bank) == 1
        rt.layers[0].generate(torch.full((2, 8), float(i + 1)))
    rt.prepare(*((name, 1, 2) for name in "abc"))
    assert rt.plan.num_with_adapter == 3
    for i, name in enumerate("abc"):
        torch.testing.assert_close(
            rt.store.vectors[0][rt.row(name)],
            expected(adapters[name], 0, torch.full((2, 8), float(i + 1))),
        )


def test_an_adapter_that_went_away_fails_its_own_request_only(tmp_path):
    _, good = write(tmp_path / "good")
    _, gone = write(tmp_path / "gone", seed=1)
    rt = runtime()
    rt.enter("a", request(tmp_path / "gone", gone, 2))
    rt.enter("b", request(tmp_path / "good", good, 2))
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    rt.prepare(("a", 2, 0), ("b", 2, 0))
    rt.layers[0].generate(torch.randn(4, 8))
    failed = rt.take_failed()
    assert list(failed) == ["a"]
    assert "adapter_model.safetensors" in failed["a"]
    assert rt.take_failed() == {}
    assert rt.store.token_rows[:4].tolist() == [0, 0, rt.row("b"), rt.row("b")]
    # A step that was scheduled before the scheduler heard of it runs the row as a base row.
    rt.prepare(("a", 1, 2), ("b", 1, 2))
    assert rt.plan.num_with_adapter == 1


@pytest.mark.parametrize("where", ["beside", "before"])
def test_a_request_that_fails_on_another_rank_fails_here_too(where, tmp_path):
    """Ranks with other columns of the same layers vote; those with earlier layers tell."""
    folders = [write(tmp_path / name, seed=i)[1] for i, name in enumerate(("bad", "good"))]
    asked = []

    def failed_anywhere(here):
        asked.append(here)
        return [where == "beside", False]

    made = runtime()
    rt = Harness(made.bank, made.store, failed_anywhere, sequences=4)
    rt.enter("a", request(tmp_path / "bad", folders[0], 2))
    rt.enter("b", request(tmp_path / "good", folders[1], 2))
    rt.failed_before(["a"] if where == "before" else [])
    rt.prepare(("a", 2, 0), ("b", 2, 0))
    assert asked == [[where == "before", False]]
    failed = rt.take_failed()
    assert list(failed) == ["a"]
    assert "rank" in failed["a"]
    assert rt.store.token_rows[:4].tolist() == [0, 0, rt.row("b"), rt.row("b")]
    rt.prepare(("a", 1, 2), ("b", 1, 2))  # nothing generates, so that nobody is asked
    assert len(asked) == 1


def test_vectors_are_made_in_float32_and_kept_in_the_model_dtype(tmp_path):
    adapter, digest = write(tmp_path / "x", input_norm=None, activation="rational")
    rt = runtime(dtype=torch.bfloat16)
    rt.enter("a", request(tmp_path / "x", digest, 1))
    rt.prepare(("a", 1, 0))
    hidden = torch.full((1, 8), 300.0, dtype=torch.bfloat16)
    rt.layers[0].generate(hidden)
    row = rt.store.vectors[0][rt.row("a")]
    assert row.dtype == torch.bfloat16
    assert torch.equal(row, expected(adapter, 0, hidden.float()).bfloat16())


@pytest.mark.parametrize("has_host", [False, True])
def test_a_retired_adapter_stays_until_its_last_request_ends(tmp_path, has_host):
    """Then its memory is free, and again after each straggler that was admitted before."""
    rt = runtime(has_host=has_host)
    _, digest = write(tmp_path / "x")
    for name in ("a", "b"):
        rt.enter(name, request(tmp_path / "x", digest, 2))
    rt.prepare(("a", 2, 0), ("b", 2, 0))
    rt.retire(digest)
    rt.leave("a")
    assert rt.bank.resident == {"device": 1, "host": 1}
    rt.leave("b")
    assert rt.bank.resident == {"device": 0, "host": 0}
    rt.enter("late", request(tmp_path / "x", digest, 2, prompt="late"))
    rt.prepare(("late", 2, 0))
    assert rt.bank.resident == {"device": 1, "host": 1}
    rt.leave("late")
    assert rt.bank.resident == {"device": 0, "host": 0}
    rt.restore(digest)
    rt.enter("new", request(tmp_path / "x", digest, 2, prompt="new"))
    rt.prepare(("new", 2, 0))
    rt.leave("new")
    assert rt.bank.resident == {"device": 1, "host": 1}


def test_counts_say_where_adapters_were_found(tmp_path):
    rt = runtime(largest=1, has_host=True)
    digests = [write(tmp_path / str(i), seed=i)[1] for i in range(2)]
    assert rt.take_stats() == {}
    for step, number in enumerate((0, 0, 1, 0)):
        name = f"r{step}"
        rt.enter(name, request(tmp_path / str(number), digests[number], 2, prompt=name))
        rt.prepare((name, 2, 0))
        rt.leave(name)
    stats = rt.take_stats()
    assert stats["prefills"] == {"disk": 2, "device": 1, "host": 1}
    assert stats["loads"] == {"host": 2, "device": 3}
    assert stats["hits"] == {"device": 1, "host": 1}
    assert stats["evictions"] == {"device": 2}
    assert stats["resident"] == {"device": 1, "host": 2}
    assert {tier: len(s) for tier, s in stats["seconds"].items()} == {"host": 2, "device": 3}
    rt.enter("gone", request(tmp_path / "0", "another digest", 2))
    rt.prepare(("gone", 2, 0))
    assert rt.take_stats()["prefills"] == {"failed": 1}


def test_where_the_device_is_the_host_both_tiers_are_one(tmp_path):
    rt = runtime(largest=1)
    digests = [write(tmp_path / str(i), seed=i)[1] for i in range(2)]
    for step, number in enumerate((0, 0, 1)):
        rt.enter(f"r{step}", request(tmp_path / str(number), digests[number], 2, prompt=f"{step}"))
        rt.prepare((f"r{step}", 2, 0))
    stats = rt.take_stats()
    assert stats["prefills"] == {"disk": 2, "device": 1}
    assert stats["loads"] == {"host": 2, "device": 2}
    assert stats["evictions"] == {"device": 1, "host": 1}
    assert stats["resident"] == {"device": 1, "host": 1}


def test_warming_up_leaves_no_trace():
    rt = runtime()
    rt.bank.arena.fill_(7)
    tensors = [*rt.store.vectors, rt.bank.arena, rt.store.prefills, rt.store.counts]
    before = [tensor.clone() for tensor in tensors]
    rt.warm_up()
    assert all(map(torch.equal, before, tensors))
    assert not rt.generates_vectors
