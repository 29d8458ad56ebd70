"""The operator inside the compiled model that makes a step's vectors, where there are any to make.

The graph only needs a node that says "this layer's store may change here, given the layer's
input". Which prompts, which adapters and where they lie is the runtime's business and changes every
step, so the node calls back into it. Steps with vectors to make never replay a CUDA graph (the
runners see to that), so the call is never skipped by a replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("vllm_pedro", "FRAGMENT")
_LIBRARY.define("prefill_vectors_(Tensor hidden, Tensor(a!) vectors) -> ()")

_layers: dict[int, Callable[[Tensor], None]] = {}
"""Address of a layer's store -> writes that layer's vectors from the layer's input."""


def bind_layer(vectors: Tensor, write: Callable[[Tensor], None]) -> None:
    """Let ``prefill_vectors(hidden, vectors)`` call ``write(hidden)``.

    The store's address is the key: it is fixed from allocation on, costs no device sync, and a
    compiler that copied the store instead of mutating it would be found out by a missing key.
    """
    _layers[vectors.data_ptr()] = write


def unbind_layers(stores: list[Tensor]) -> None:
    """Forget these stores."""
    for vectors in stores:
        _layers.pop(vectors.data_ptr(), None)


def _prefill_vectors(hidden: Tensor, vectors: Tensor) -> None:
    try:
        write = _layers[vectors.data_ptr()]
    except KeyError:
        raise RuntimeError(
            "vllm_pedro::prefill_vectors_ was given a tensor that is no layer's vector store: the "
            "compiled graph copied the store instead of changing it in place"
        ) from None
    write(hidden)


_LIBRARY.impl("prefill_vectors_", _prefill_vectors, "CPU")
_LIBRARY.impl("prefill_vectors_", _prefill_vectors, "CUDA")


@torch.library.register_fake("vllm_pedro::prefill_vectors_", lib=_LIBRARY)
def _(hidden: Tensor, vectors: Tensor) -> None:
    return None


def prefill_vectors(hidden: Tensor, vectors: Tensor) -> None:
    """Make the vectors of the step's prompts for one layer.

    Args:
        hidden: ``[tokens, d]``, the residual stream before the layer's input norm.
        vectors: ``[slots, D]``, the layer's store, bound by :func:`bind_layer`; rows change.
    """
    torch.ops.vllm_pedro.prefill_vectors_(hidden, vectors)
