import pytest
import torch

from vllm_pedro.ops import bind_layer, prefill_vectors, unbind_layers


@pytest.fixture
def layer():
    vectors, calls = torch.ones(4, 6), []

    def write(hidden):
        calls.append(hidden.shape)
        vectors[1] = hidden.sum()

    bind_layer(vectors, write)
    yield vectors, calls
    unbind_layers([vectors])


def test_it_calls_the_layer_that_the_store_belongs_to(layer):
    vectors, calls = layer
    prefill_vectors(torch.ones(2, 3), vectors)
    assert calls == [(2, 3)]
    assert vectors[1].tolist() == [6.0] * 6


def test_a_copied_store_is_found_out(layer):
    with pytest.raises(RuntimeError, match="copied the store"):
        prefill_vectors(torch.ones(2, 3), layer[0].clone())


def test_opcheck(monkeypatch):
    # opcheck calls the operator on clones, which it refuses by design: let every store be known.
    class AnyStore(dict):
        def __missing__(self, key):
            return lambda hidden: None

    monkeypatch.setattr("vllm_pedro.ops.vectors._layers", AnyStore())
    torch.library.opcheck(
        torch.ops.vllm_pedro.prefill_vectors_.default, (torch.ones(2, 3), torch.ones(4, 6))
    )


def test_a_compiled_graph_changes_the_store_before_it_reads_it(layer):
    vectors, _ = layer

    def step(hidden, store):
        prefill_vectors(hidden, store)
        return store[1] * 2

    out = torch.compile(step, backend="inductor", fullgraph=True)(torch.ones(2, 3), vectors)
    assert out.tolist() == [12.0] * 6
