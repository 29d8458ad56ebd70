"""The vector store: every running sequence's adjustment vectors, kept beside its KV blocks."""

from __future__ import annotations

import torch

from ..config import TARGET_MODULES, BackboneShape
from .plan import IDENTITY_SLOT, StepPlan


class VectorStore:
    """Adjustment vectors of all running sequences, one tensor per layer.

    Row 0 is all ones and never written: rows without an adapter, padding and dummy rows read it.
    Allocated once, before vLLM profiles its memory, and filled in place, so addresses stay fixed.

    Attributes:
        modules: The target modules the columns stand for, in canonical order.
        columns: Column range of each module.
        vectors: Per layer ``[num_sequences + 1, D]`` in the model's dtype.
        token_slots: ``[max_tokens]`` int64; the row that each token of the step reads.
    """

    def __init__(
        self,
        shape: BackboneShape,
        modules: tuple[str, ...],
        num_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        wanted = set(modules)
        if {"q_proj", "v_proj"} <= wanted:
            # K lies between Q and V in the packed projection; one contiguous range is scaled.
            wanted.add("k_proj")
        self.modules = tuple(m for m in TARGET_MODULES if m in wanted)
        self.columns: dict[str, slice] = {}
        width = 0
        for module in self.modules:
            self.columns[module] = slice(width, width + shape.widths[module])
            width += shape.widths[module]
        self.width = width
        # One tensor a layer, not views of one: the compiled graph mutates it in place, and
        # functionalisation copies aliased inputs.
        self.vectors = [
            torch.ones(num_sequences + 1, width, dtype=dtype, device=device)
            for _ in range(shape.num_layers)
        ]
        self.token_slots = torch.full(
            (max_tokens,), IDENTITY_SLOT, dtype=torch.int64, device=device
        )
        pin = device.type == "cuda"
        self._staging = torch.full((max_tokens,), IDENTITY_SLOT, dtype=torch.int64, pin_memory=pin)
        self._staging_np = self._staging.numpy()
        self._dirty = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' vectors."""
        return sum(v.numel() * v.element_size() for v in self.vectors)

    def load_plan(self, plan: StepPlan) -> None:
        """Point every token of the step at its row, and all later tokens at the identity."""
        if plan.num_tokens > len(self._staging_np):
            raise RuntimeError(
                f"a step of {plan.num_tokens} tokens exceeds the {len(self._staging_np)} that the "
                "vector store was sized for"
            )
        extent = max(self._dirty, max((s.start + s.length for s in plan.segments), default=0))
        if extent == 0:
            return
        self._staging_np[:extent] = IDENTITY_SLOT
        for segment in plan.segments:
            self._staging_np[segment.start : segment.start + segment.length] = segment.slot
        self.token_slots[:extent].copy_(self._staging[:extent], non_blocking=True)
        self._dirty = extent if plan.segments else 0
