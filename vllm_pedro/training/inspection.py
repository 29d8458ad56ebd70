"""What an adapter has learnt: its vectors over prompts, and its activation functions, drawn.

Three questions about a trained adapter have an answer in numbers. Has it moved from the identity?
Then its vectors differ from one. Do they depend on the prompt? Then they differ from prompt to
prompt. Does that matter? Then completions are less likely with the vectors of other prompts; if
not, the adapter is static vectors, (IA)^3, with extra steps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import PedroError
from ..generator import activate
from ..model import PedroModel
from .data import Example
from .evaluate import TransformersEngine

# GELU has all its shape here; with an input norm, inputs of the activations lie within.
PLOT_LIMIT = 4.0
PAD = 0
"""Token id of the columns that are masked out."""
LEAST_COST = 0.01
"""Nats a token that vectors of another prompt cost at least if prompts matter: a hundredth of each
token's probability."""


@dataclass(frozen=True)
class LayerSpread:
    """How one module's vectors of one layer lie over the prompts.

    Attributes:
        layer: the layer.
        module: the scaled projection.
        deviation: root mean square of the vectors' entries minus one, over prompts and entries.
        spread: the part of it that differs between prompts: root mean square of the entries minus
            their mean over the prompts.
    """

    layer: int
    module: str
    deviation: float
    spread: float

    @property
    def prompt_share(self) -> float:
        """Spread as a share of the deviation: 0 for static vectors, 1 if all is the prompt's."""
        return self.spread / self.deviation if self.deviation > 0 else 0.0


@torch.no_grad()
def vectors_of_prompts(
    model: PedroModel, prompts: Sequence[Sequence[int]]
) -> list[dict[str, Tensor]]:
    """The vectors that the active adapter makes of some prompts.

    Args:
        model: the model.
        prompts: token ids of N prompts.

    Returns:
        For each layer, by module, `[N, d_t]` in float32 on the CPU.
    """
    if model.active_adapter is None:
        raise PedroError("no adapter is active")
    engine = TransformersEngine(model, PAD)
    generators: Any = model.vector_generators[model.active_adapter]
    found: list[dict[str, list[Tensor]]] = [{} for _ in generators]

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: dict[str, Tensor]) -> None:
            for name, vectors in output.items():
                found[layer].setdefault(name, []).append(vectors.float().cpu())

        return hook

    model.eval()
    batches = engine.batches([len(prompt) for prompt in prompts])
    handles = [g.register_forward_hook(keep(layer)) for layer, g in enumerate(generators)]
    try:
        for chosen in batches:
            engine.forward(engine.collate([Example(list(prompts[i]), []) for i in chosen]), 1)
    finally:
        for handle in handles:
            handle.remove()
    place = torch.tensor([i for chosen in batches for i in chosen]).argsort()
    return [{name: torch.cat(rows)[place] for name, rows in layer.items()} for layer in found]


@torch.no_grad()
def row_losses(
    model: PedroModel, examples: Sequence[Example], vectors: Sequence[dict[str, Tensor]]
) -> Tensor:
    """How likely completions are with given vectors.

    Args:
        model: the model.
        examples: N rows.
        vectors: for each layer, by module, `[N, d_t]`: what each row is scaled by.

    Returns:
        `[N]` float32: nats a token of each row's completion.
    """
    engine = TransformersEngine(model, PAD)
    generators: Any = model.vector_generators[model._active()]
    device = next(model.parameters()).device
    chosen: list[int] = []

    def given(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> dict[str, Tensor]:
            return {name: rows[chosen].to(device) for name, rows in vectors[layer].items()}

        return hook

    losses = torch.empty(len(examples))
    handles = [g.register_forward_hook(given(layer)) for layer, g in enumerate(generators)]
    try:
        for chosen in engine.batches([len(example) for example in examples]):  # the hooks read it
            for i, line in zip(
                chosen, engine.completion_logprobs([examples[i] for i in chosen]), strict=True
            ):
                losses[i] = -sum(line) / len(line)
    finally:
        for handle in handles:
            handle.remove()
    return losses


@dataclass(frozen=True)
class PromptUse:
    """Whether it matters that vectors are made from the prompt.

    Attributes:
        rows: N, how many rows were looked at.
        share: the part of the vectors' deviation from one that differs between prompts.
        loss: nats a token, the mean over rows, with each row's own vectors.
        loss_swapped: the same with the vectors of another row's prompt.
        loss_mean: the same with the mean of all rows' vectors, the same for every row.
        error: standard error of `loss_swapped - loss`, over the rows.
    """

    rows: int
    share: float
    loss: float
    loss_swapped: float
    loss_mean: float
    error: float

    @property
    def matters(self) -> bool:
        """Whether swapping costs more than `LEAST_COST`, and than twice its standard error."""
        return self.loss_swapped - self.loss > max(2 * self.error, LEAST_COST)


def prompt_use(
    model: PedroModel, examples: Sequence[Example], vectors: Sequence[dict[str, Tensor]]
) -> PromptUse:
    """Swap the rows' vectors and see what becomes of the loss.

    Args:
        model: the model.
        examples: N >= 2 rows.
        vectors: of their prompts, see `vectors_of_prompts`.
    """
    number = len(examples)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    others = torch.empty_like(order)
    others[order] = order.roll(1)
    swapped = [{name: rows[others] for name, rows in layer.items()} for layer in vectors]
    means = [
        {name: rows.mean(dim=0).expand_as(rows) for name, rows in layer.items()}
        for layer in vectors
    ]
    own, other, mean = (row_losses(model, examples, v) for v in (vectors, swapped, means))
    return PromptUse(
        number,
        prompt_share(spread_over_prompts(vectors)),
        float(own.mean()),
        float(other.mean()),
        float(mean.mean()),
        float((other - own).std() / number**0.5),
    )


def describe_use(use: PromptUse) -> str:
    """The verdict in two lines."""
    if use.share == 0:
        text = "the vectors are the same for all prompts: static vectors, which are (IA)3"
    else:
        text = f"the prompt makes {use.share:.1%} of what the vectors differ from one"
    verdict = "the prompt matters"
    if not use.matters:
        verdict = "the prompt hardly matters; static vectors, (IA)3, would do as well"
    return (
        f"{text}\nloss of {use.rows} rows: {use.loss:.4g} with their own vectors, "
        f"{use.loss_swapped:.4g} with those of other prompts, {use.loss_mean:.4g} with the mean: "
        f"{verdict}"
    )


def prompt_share(rows: Sequence[LayerSpread]) -> float:
    """`LayerSpread.prompt_share` of all layers and modules together."""
    total = sum(row.deviation**2 for row in rows)
    return (sum(row.spread**2 for row in rows) / total) ** 0.5 if total > 0 else 0.0


def spread_over_prompts(vectors: Sequence[dict[str, Tensor]]) -> list[LayerSpread]:
    """`LayerSpread` of each layer and module, from what `vectors_of_prompts` returns."""
    rows = []
    for index, layer in enumerate(vectors):
        for name, values in layer.items():
            deviation = (values - 1.0).square().mean().sqrt()
            # With float32 rows that are all alike, the mean may be off by a rounding.
            centred = values - values.mean(dim=0)
            spread = 0.0 if bool((values == values[0]).all()) else centred.square().mean().sqrt()
            rows.append(LayerSpread(index, name, float(deviation), float(spread)))
    return rows


def describe_spread(rows: Sequence[LayerSpread], number: int) -> str:
    """The spread as a table, and in one sentence."""
    lines = [
        f"vectors over {number} prompts (root mean squares)",
        f"{'layer':>5}  {'module':<10}{'from one':>11}{'over prompts':>14}{'share':>8}",
    ]
    for row in rows:
        lines.append(
            f"{row.layer:>5}  {row.module:<10}{row.deviation:>11.4g}{row.spread:>14.4g}"
            f"{row.prompt_share:>8.1%}"
        )
    share = prompt_share(rows)
    if not any(row.deviation for row in rows):
        text = "the vectors are all ones: the adapter changes nothing"
    elif share < 0.01:
        text = f"the prompt makes {share:.1%} of it: the adapter has collapsed to static vectors"
    else:
        text = f"the prompt makes {share:.1%} of what the vectors differ from one"
    return "\n".join([*lines, text])


def describe_layers(adapter: Adapter) -> str:
    """Layer by layer: b_up, which is the vectors' static part, and the size of the generator."""
    lines = [
        f"{'layer':>5}  {'activation':<11}{'b_up mean':>11}{'std':>9}{'min':>9}{'max':>9}"
        f"{'|W_down|':>10}{'|W_up|':>9}"
    ]
    for index in range(adapter.num_layers):
        layer = adapter.layer(index)
        bias = layer.bias
        if not len(bias):
            lines.append(f"{index:>5}  -")
            continue
        kind = "-" if layer.down is None else adapter.config.activation_of(index)
        text = f"{index:>5}  {kind:<11}{float(bias.mean()):>11.4f}"
        for value in (bias.std(correction=0), bias.min(), bias.max()):
            text += f"{float(value):>9.4f}"
        for weight, width in ((layer.down, 10), (layer.up, 9)):
            text += f"{'-' if weight is None else f'{float(weight.norm()):.4g}':>{width}}"
        lines.append(text)
    return "\n".join(lines)


def plot(
    adapter: Adapter,
    path: str | os.PathLike[str],
    spread: Sequence[LayerSpread] | None = None,
) -> None:
    """Draw the learned activation functions beside GELU, and the spread over prompts if given.

    Args:
        adapter: the adapter.
        path: the image file; its ending says the format, e.g. ".png".
        spread: as `spread_over_prompts` returns it.

    Raises:
        PedroError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PedroError("--plot needs matplotlib: pip install 'vllm-pedro[plot]'") from error
    figure = Figure(figsize=(12 if spread else 6.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves = figure.add_subplot(1, 2 if spread else 1, 1)
    x = torch.linspace(-PLOT_LIMIT, PLOT_LIMIT, 401)
    colours = colormaps["viridis"]
    last = max(adapter.num_layers - 1, 1)
    for index in range(adapter.num_layers):
        layer = adapter.layer(index)
        if layer.down is None:
            continue
        kind = adapter.config.activation_of(index)
        y = activate(x, kind, layer.numerator, layer.denominator)
        label = f"layer {index}" if index in (0, adapter.num_layers - 1) else None
        curves.plot(x, y, color=colours(index / last), linewidth=0.9, label=label)
    curves.plot(x, activate(x, "gelu"), "k--", linewidth=1.6, label="GELU")
    curves.set(title="activation functions", xlabel="x", ylabel="g(x)")
    curves.grid(alpha=0.3)
    curves.legend()
    if spread:
        axes = figure.add_subplot(1, 2, 2)
        for name in dict.fromkeys(row.module for row in spread):
            rows = [row for row in spread if row.module == name]
            layers = [row.layer for row in rows]
            (line,) = axes.plot(layers, [row.spread for row in rows], marker=".", label=name)
            deviations = [row.deviation for row in rows]
            axes.plot(layers, deviations, ":", color=line.get_color())
        axes.set(
            title="vectors: over prompts (solid), from one (dotted)",
            xlabel="layer",
            ylabel="root mean square",
        )
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise PedroError(f"cannot write {os.fspath(path)}: {error}") from error
