"""PEDRO on a plain transformers model: for training, and the reference that serving is held to.

`PedroModel` leaves the backbone's modules and their names alone and works by hooks. One forward
pass goes like this:

1. Before the backbone's forward, a `Pass` is made: either with the mask of the prompt tokens (a
   prompt is being read), or with the vectors that the KV cache carries (a sequence goes on).
2. The pass travels to each decoder layer as a keyword argument. A keyword argument, and not an
   attribute somewhere, because gradient checkpointing runs a layer again in the backward pass,
   long after the forward pass has ended, and hands it the arguments of its first run.
3. Before a layer's forward, its vectors are made from its input, or taken from the pass; hooks on
   its projections multiply their outputs; after it, everything it should have done is checked.
4. The vectors ride on the KV cache, so whatever reorders, repeats or copies the cache does the
   same to them.

A sequence is a row of the input, or, in packed training, a stretch of one: the vectors then have a
row for each sequence, and each token is told which one is its own.
"""

from __future__ import annotations

from .cache import PromptVectors
from .pedro_model import PedroModel, get_pedro_model
from .prompts import IGNORED_LABEL
from .wiring import takes_prompts

__all__ = ["IGNORED_LABEL", "PedroModel", "PromptVectors", "get_pedro_model", "takes_prompts"]
