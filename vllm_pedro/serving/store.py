"""The vector store: every running sequence's adjustment vectors, kept beside its KV blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .columns import StoreColumns
from .plan import IDENTITY_ROW, StepPlan


class VectorStore:
    """Adjustment vectors of all running sequences, one tensor per layer.

    They are held as l - 1, so that 16 bits keep what differs between prompts. Row 0 is all zeros,
    the identity, and never written: rows without an adapter, padding and dummy rows read it.
    Allocated once, before vLLM profiles its memory, and filled in place, so addresses stay fixed.

    Attributes:
        columns: Which entry of an adapter's vectors each column holds.
        vectors: Per layer `[num_sequences + 1, D]` in the model's dtype, l - 1.
        token_rows: `[max_tokens]` int64, the row that each token of the step reads.
        prefills: `[num_sequences, 4]` int32, see `vllm_pedro.ops.generate_vectors`.
        counts: `[3]` int32 on the CPU: how many prompts generate vectors in this step, how many
            requests read another row than the identity, and the highest rank of the adapters that
            generate.
    """

    STAGES = 3
    """Pinned buffers that take turns: a step is prepared while copies of earlier ones may wait."""

    def __init__(
        self,
        columns: StoreColumns,
        num_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.columns = columns
        # One tensor a layer, not views of one: the compiled graph mutates it in place, and
        # functionalisation copies aliased inputs.
        self.vectors = [
            torch.zeros(num_sequences + 1, width, dtype=dtype, device=device)
            for width in columns.widths()
        ]
        self.token_rows = torch.full((max_tokens,), IDENTITY_ROW, dtype=torch.int64, device=device)
        self.prefills = torch.zeros(num_sequences, 4, dtype=torch.int32, device=device)
        self.counts = torch.zeros(3, dtype=torch.int32)
        self._counts = self.counts.numpy()
        self._stages: list[_Stage] = []
        if device.type != "cpu":
            self._stages = [_Stage(max_tokens, num_sequences, device) for _ in range(self.STAGES)]
        self._dirty = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' vectors."""
        return sum(v.numel() * v.element_size() for v in self.vectors)

    @property
    def has_prefills(self) -> bool:
        """Whether prompts of the step generate vectors: its forward pass runs the generators."""
        return bool(self._counts[0])

    @property
    def scales_rows(self) -> bool:
        """Whether the step's operators have rows to scale; also in runs that may be captured."""
        return bool(self._counts[1])

    def load_plan(
        self, plan: StepPlan, prefills: Sequence[tuple[int, int, int, int]] = (), rank: int = 0
    ) -> None:
        """Point every token of the step at its row, and all later tokens at the identity.

        Buffers are filled in place and, on a device, by copies that the host does not wait for.

        Args:
            plan: The step's plan.
            prefills: Rows for `prefills`.
            rank: The highest of their adapters.
        """
        active, tokens = plan.num_with_adapter, plan.num_tokens
        if tokens > len(self.token_rows):
            raise RuntimeError(
                f"a step of {tokens} tokens exceeds the {len(self.token_rows)} that the "
                "vector store was sized for"
            )
        self._counts[:] = len(prefills), active, rank
        tokens = tokens if active else 0
        extent = max(self._dirty, tokens)
        self._dirty = tokens
        if extent == 0:
            return
        if self._stages:
            stage = self._stages.pop(0)
            self._stages.append(stage)
            stage.wait()
            rows, table = stage.token_rows, stage.prefills
        else:
            rows, table = self.token_rows, self.prefills
        numbers = rows.numpy()
        if tokens == len(plan.store_rows):
            numbers[:tokens] = plan.store_rows
        elif tokens:
            numbers[:tokens] = np.repeat(plan.store_rows, plan.lengths)
        numbers[tokens:extent] = IDENTITY_ROW
        if prefills:
            table.numpy()[: len(prefills)] = prefills
        if self._stages:
            self.token_rows[:extent].copy_(rows[:extent], non_blocking=True)
            if prefills:
                self.prefills[: len(prefills)].copy_(table[: len(prefills)], non_blocking=True)
            stage.sent()

    def load_dummy(self) -> None:
        """For dummy, profiling and capture runs: no prompt generates, all tokens read the identity.

        On a device the operators are still launched, because the run may be captured into a graph
        that serves steps with adapters later.
        """
        self.load_plan(StepPlan())
        if self._stages:
            self._counts[1] = 1


class _Stage:
    """Host copies of a step's device buffers, not to be written while their copy is under way."""

    def __init__(self, max_tokens: int, num_sequences: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.token_rows = torch.zeros(max_tokens, dtype=torch.int64, pin_memory=pin)
        self.prefills = torch.zeros(num_sequences, 4, dtype=torch.int32, pin_memory=pin)
        self._event: Any = torch.cuda.Event() if pin else None

    def wait(self) -> None:
        """Until the last copy from here is done; with three stages it is, two steps later."""
        if self._event is not None:
            self._event.synchronize()

    def sent(self) -> None:
        """Copies from here were enqueued."""
        if self._event is not None:
            self._event.record()
