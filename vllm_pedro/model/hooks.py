"""One forward pass, and what hooks do in each decoder layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PedroError
from ..generator import VectorGenerator
from ..places import Projection, packed, widths_of
from .cache import PromptVectors, attach_vectors
from .experts import ScaledExperts
from .prompts import Packed
from .scaling import Factor, scale_sequences

PASS_KEY = "pedro_pass"


@dataclass
class Pass:
    """One forward pass of the backbone.

    Attributes:
        generators: the adapter's vector generators, one a layer.
        vectors: those made in this pass, or, if `is_prefill` is False, those to reuse.
        mask: bool `[B, S]`, the pooled tokens; None means all.
        is_prefill: whether prompts are being read.
        packed: where the sequences are, if rows hold several; `mask` is then not used.
        readers: `[B, S]`, whose vectors each token reads, of N sequences; N where it reads none, in
            scope "answer". None where each row is one sequence that reads its own.
        layers_run: indices of the layers that took part.
        is_handed_on: whether the backbone hands the pass on to its layers, among the keyword
            arguments. Otherwise they look it up while it runs; gradient checkpointing, which runs
            them again later, is then not possible.
    """

    generators: Sequence[nn.Module] | nn.ModuleList
    vectors: PromptVectors
    mask: Tensor | None
    is_prefill: bool
    packed: Packed | None = None
    readers: Tensor | None = None
    layers_run: set[int] = field(default_factory=set)
    is_handed_on: bool = True

    def vectors_of(self, index: int, hidden: Tensor, cache: Any) -> dict[str, Tensor]:
        """The vectors of layer `index`, `[B, d_t]` each, or `[N, d_t]` of N packed sequences."""
        self.layers_run.add(index)
        if not isinstance(self.generators[index], VectorGenerator):  # nothing of it is scaled
            return self.vectors.layers.setdefault(index, {})
        if not self.is_prefill:
            vectors = self.vectors.layers[index]
            rows = next(iter(vectors.values())).shape[0]
            if rows != hidden.shape[0]:
                raise PedroError(
                    f"the KV cache carries vectors of {rows} sequences, the input has "
                    f"{hidden.shape[0]}"
                )
            return vectors
        generator = cast(VectorGenerator, self.generators[index])
        device = generator.up_proj.shift.device
        mask = self.mask
        if self.packed is not None:
            hidden = hidden.flatten(0, 1)[self.packed.index.to(hidden.device)]
            mask = self.packed.mask
        mask = None if mask is None else mask.to(device)
        vectors = cast(dict[str, Tensor], generator(hidden.to(device), mask))
        if cache is not None:
            self.vectors.layers[index] = vectors
            attach_vectors(cache, self.vectors)
        return vectors


class Factors:
    """What a projection's outputs are multiplied by.

    Args:
        projection: where they come from.
    """

    def __init__(self, projection: Projection) -> None:
        codes = projection.codes
        widths = widths_of([codes])
        self.widths = {name: widths[name] for name in projection.modules}
        whole = packed(self.widths)
        # Where each output's entry is among the modules' vectors, one after the other.
        self._order = None
        if not np.array_equal(whole, codes):
            self._order = torch.from_numpy(np.searchsorted(whole, codes))

    def of(self, vectors: dict[str, Tensor], output: Tensor) -> Tensor:
        """`[rows, width]`, from the vectors of the modules that are scaled."""
        rows = next(iter(vectors.values())).shape[0]
        parts = [
            vectors[name].to(output.device, output.dtype)
            if name in vectors
            else output.new_ones(rows, width)
            for name, width in self.widths.items()
        ]
        factor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return factor if self._order is None else factor[:, self._order.to(factor.device)]


class LayerHooks:
    """What PEDRO does in one decoder layer."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        projections: list[Projection],
        running: Callable[[], Pass | None],
    ) -> None:
        self.index = index
        self.running = running
        self.current: dict[str, Tensor] | None = None
        self.readers: Tensor | None = None
        self.applied: list[str] = []
        self.handles: list[Any] = [
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, always_call=True),
        ]
        for projection in projections:
            hook = functools.partial(self.scale, factors=Factors(projection))
            module = layer.get_submodule(projection.path)
            if projection.is_experts:
                factor = functools.partial(self.factor, factors=Factors(projection))
                self.handles.append(ScaledExperts(module, factor))
            elif projection.is_input:
                before = functools.partial(self.scale_input, factors=Factors(projection))
                self.handles.append(module.register_forward_pre_hook(before))
            else:
                self.handles.append(module.register_forward_hook(hook))

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        current: Pass | None = kwargs.pop(PASS_KEY, None)
        if current is None:
            current = self.running()
            if current is None or self.index in current.layers_run:
                return None
            current.is_handed_on = False
        hidden = args[0] if args else kwargs["hidden_states"]
        self.applied = []
        self.readers = current.readers
        self.current = current.vectors_of(self.index, hidden, kwargs.get("past_key_values"))
        return args, kwargs

    def factor(self, output: Tensor, factors: Factors) -> Factor | None:
        """What scales an output; None where nothing does.

        Args:
            output: `[B, S, width]`, or `[B * S, width]` where tokens have lost their rows.
            factors: the projection's.
        """
        if self.current is None or self.current.keys().isdisjoint(factors.widths):
            return None
        self.applied += [name for name in factors.widths if name in self.current]
        factor, readers = factors.of(self.current, output), self.readers
        if readers is not None:
            # One more, for tokens that read none.
            factor = torch.cat([factor, factor.new_ones(1, factor.shape[1])])
            return factor, readers.to(output.device).view(output.shape[:-1])
        if output.dim() == 3:
            return factor, None
        rows = torch.arange(len(factor), device=output.device)
        return factor, rows.repeat_interleave(len(output) // len(factor))

    def scale(
        self, module: nn.Module, args: Any, output: Tensor, factors: Factors
    ) -> Tensor | None:
        found = self.factor(output, factors)
        return None if found is None else scale_sequences(output, *found)

    def scale_input(
        self, module: nn.Module, args: tuple[Any, ...], factors: Factors
    ) -> tuple[Any, ...] | None:
        scaled = self.scale(module, None, args[0], factors)
        return None if scaled is None else (scaled, *args[1:])

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self.current = self.current, None
        # None: the layer raised, as it does when checkpointing stops a second run early.
        if current is not None and output is not None and sorted(self.applied) != sorted(current):
            raise PedroError(
                f"layer {self.index}: expected one use of each of {list(current)}, found "
                f"{self.applied}: this layer does not compute its projections as PEDRO expects"
            )
