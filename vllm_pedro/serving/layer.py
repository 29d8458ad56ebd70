"""What one decoder layer does: generate a step's vectors, and scale its projections by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class PedroLayer(nn.Module):
    """One decoder layer's tensors, as buffers so that a compiled graph takes them as inputs.

    Args:
        vectors: `[rows, D]`, the layer's part of the vector store, l - 1.
        layer: The layer's number.
        arena: uint8, the adapters; shared by all layers.
        token_rows: `[max_tokens]` int64, the row that each token reads; shared by all layers.
        prefills: `[sequences, 4]` int32, the step's prefills; shared by all layers.
        counts: `[3]` int32 on the CPU, the step's counts; shared by all layers.

    Attributes:
        one: A scalar 1 in the model's dtype, which no compiler can fold away.
    """

    vectors: Tensor
    layer: Tensor
    arena: Tensor
    token_rows: Tensor
    prefills: Tensor
    counts: Tensor
    one: Tensor

    def __init__(
        self,
        vectors: Tensor,
        layer: int,
        arena: Tensor,
        token_rows: Tensor,
        prefills: Tensor,
        counts: Tensor,
    ) -> None:
        super().__init__()
        for name, tensor in (
            ("vectors", vectors),
            # A tensor, because graphs with other numbers would be compiled one by one.
            ("layer", torch.tensor([layer], dtype=torch.int32, device="cpu")),
            ("arena", arena),
            ("token_rows", token_rows),
            ("prefills", prefills),
            ("counts", counts),
            ("one", torch.ones((), dtype=vectors.dtype, device=vectors.device)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def generate(self, hidden: Tensor) -> None:
        """Run the generators of the step's prompts and write their vectors into the store.

        Args:
            hidden: `[tokens, d]`, the residual stream before the layer's input norm, over the
                whole flattened batch.
        """
        ops.generate_vectors(
            hidden, self.vectors, self.arena, self.prefills, self.layer, self.counts
        )

    def scale_(self, x: Tensor, ranges: tuple[int, ...]) -> None:
        """Multiply columns of a packed projection by each token's vectors, in place.

        Args:
            x: `[tokens, width]`; rows without an adapter are neither read nor written.
            ranges: Flat triples of column of `x`, column of the store, width.
        """
        # As attributes they would be looked up by nn.Module, which takes longer, in each layer.
        own = self._buffers
        ops.scale_columns_(x, own["vectors"], own["token_rows"], ranges, own["counts"])  # type: ignore[arg-type]

    def scaled(self, x: Tensor, columns: slice) -> Tensor:
        """The same for compilers, which fuse it into what comes after.

        Args:
            x: `[tokens, width]`.
            columns: The columns of the store that belong to `x`.
        """
        return ops.scaled(x, self.vectors, self.token_rows, columns)
