"""A start for training, made from the training prompts.

As drawn, W_down sees almost a constant: pooled states of different prompts share most of what they
are, and a few dimensions hold most of the rest. What differs between prompts then reaches W_up so
small that b_up learns everything first, and the adapter ends as static vectors.

Here the pooled states p of some training prompts are looked at first, layer by layer. With their
mean m, W the rows of W_down as drawn less their parts along m, and the deviations s_k over these
prompts of the entries of W p,

    W_down[k] = c W[k] / s_k,   b_down = -W_down m

so that each entry of `x = W_down p + b_down` has mean 0 and deviation c over these prompts. p is
what W_down sees: after the input norm, if there is one, and after pooling. Centring and scaling are
linear in it, so nothing but W_down and b_down has to be stored, and serving costs nothing. W_up
stays 0 and b_up 1: the adapter is still the identity.

b_down is 0 but for rounding, and learns from there. With the parts along m left in it would be as
large as W_down m, up to 40 on SmolLM2-135M, against which W_down p has to cancel: a bfloat16 file
would then change x by up to 14 % of what differs between prompts, where it is up to 6 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PedroError
from ..generator import VectorGenerator, pool_prompt
from ..model import PedroModel

MAX_PROMPTS = 128
"""Prompts whose pooled states are looked at."""
BATCH_ROWS = 8
LAST_COLUMN = torch.tensor([-1])
"""Whose logits are made. As an index: the number 1 is slow, see `TransformersEngine.forward`."""
DEVIATION = 0.5
"""c, of the activations' inputs."""
SAME = 1e-3
"""Pooled states are all the same if they deviate by less than so much of their root mean square, as
in the first layer, where all prompts end in one token. W_down then stays as it is drawn."""


@torch.no_grad()
def pooled_states(
    model: PedroModel, examples: Sequence[Any], collate: Callable[[list[Any]], dict[str, Tensor]]
) -> list[Tensor]:
    """What W_down of the active adapter sees of some prompts.

    Args:
        model: the model; a fresh adapter, so that the states are the backbone's.
        examples: N rows, as `collate` takes them.
        collate: makes a batch of rows; one that pads, such as `CompletionCollator`.

    Returns:
        For each layer `[N, d]`, float32 on the CPU; empty where none of it is scaled.
    """
    generators: Any = model.vector_generators[model._active()]
    found: list[list[Tensor]] = [[] for _ in generators]

    def keep(layer: int) -> Any:
        def hook(module: VectorGenerator, args: Any) -> None:
            pooled = pool_prompt(args[0], module.pooling, module.input_norm, args[1])
            found[layer].append(pooled.float().cpu())

        return hook

    handles = [g.register_forward_pre_hook(keep(i)) for i, g in enumerate(generators)]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for begin in range(0, len(examples), BATCH_ROWS):
            rows = [examples[i] for i in range(begin, min(begin + BATCH_ROWS, len(examples)))]
            batch = {name: value.to(device) for name, value in collate(rows).items()}
            del batch["labels"]
            model(**batch, use_cache=False, logits_to_keep=LAST_COLUMN)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) if rows else torch.empty(0) for rows in found]


@torch.no_grad()
def condition(
    model: PedroModel, examples: Sequence[Any], collate: Callable[[list[Any]], dict[str, Tensor]]
) -> None:
    """Give a fresh adapter the start of this module's text; it stays the identity.

    Args:
        model: the model; its active adapter is fresh and has a down bias.
        examples: the training rows; up to `MAX_PROMPTS` are used, evenly spaced.
        collate: see `pooled_states`.

    Raises:
        PedroError: the adapter has no down bias, or is not fresh.
    """
    name = model._active()
    config = model.pedro_configs[name]
    if config.r == 0 or not config.down_bias:
        raise PedroError("a start from the data needs r above 0 and down_bias true")
    generators: Any = model.vector_generators[name]
    made: list[Any] = [g for g in generators if isinstance(g, VectorGenerator)]
    if any(bool(generator.up_proj.weight.any()) for generator in made):
        raise PedroError(f"a start from the data: adapter {name!r} has been trained already")
    number = min(len(examples), MAX_PROMPTS)
    chosen = [examples[i * len(examples) // number] for i in range(number)]
    states_of = [states for states in pooled_states(model, chosen, collate) if len(states)]
    for generator, states in zip(made, states_of, strict=True):
        start = start_of(states, generator.down_proj.weight.cpu())
        if start is not None:
            generator.down_proj.weight.copy_(start[0])
            generator.down_proj.bias.copy_(start[1])


def start_of(states: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor] | None:
    """W_down and b_down of one layer.

    Args:
        states: `[N, d]`, pooled states.
        drawn: `[r, d]`, a W_down as drawn.

    Returns:
        `[r, d]` and `[r]` float32; None where the states are all the same.
    """
    states, drawn = states.double(), drawn.double()
    mean = states.mean(dim=0)
    drawn = drawn - torch.outer(drawn @ mean, mean) / mean.square().sum()
    centred = states - mean
    if centred.square().mean() <= SAME**2 * states.square().mean():
        return None
    inner = centred @ drawn.T
    down = DEVIATION * drawn / inner.square().mean(dim=0).sqrt()[:, None]
    return down.float(), -(down @ mean).float()
