"""Which tokens of a batch are pooled: padded, packed, or told by labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from ..errors import PedroError
from ..files import shorten

IGNORED_LABEL: Final = -100  # what transformers' losses leave out


@dataclass(frozen=True)
class Prompts:
    """What a call says about its prompts.

    Attributes:
        width: columns of the input that can hold prompt tokens; later ones are generated. None if
            the whole input can.
        attention_mask: bool `[B, width]`; None if unknown until the backbone is called.
        lengths: `[B]`, pooled length of each row in real tokens; None for all of them.
        mask: bool `[B, width]`, the pooled tokens, instead of lengths.
        expands: whether the backbone may be called with a multiple of B rows (beams, samples).
        sequences: `[B, width]`, which of N packed sequences each token belongs to; `lengths` is
            then `[N]`. None if every row is one sequence.
    """

    width: int | None = None
    attention_mask: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    expands: bool = False
    sequences: Tensor | None = None

    def packed(self, tokens: Tensor, pooling: str) -> Packed:
        """Where the pooled tokens of packed sequences are.

        Args:
            tokens: the backbone's input, `[B, S, ...]`.
            pooling: the adapter's; for "last" one token of each sequence is enough.
        """
        assert self.sequences is not None
        sequences = self.sequences.to(tokens.device)
        if sequences.shape != tokens.shape[:2]:
            raise PedroError(
                f"position_ids: expected {list(tokens.shape[:2])}, found {list(sequences.shape)}"
            )
        of_token = sequences.flatten()
        number = int(of_token[-1]) + 1
        sizes = of_token.bincount(minlength=number)
        pooled = torch.ones_like(of_token, dtype=torch.bool)
        place = torch.arange(len(of_token), device=tokens.device)
        place = place - (sizes.cumsum(0) - sizes)[of_token]
        if self.lengths is not None:
            lengths = self.lengths.to(tokens.device)
            if len(lengths) != number:
                raise PedroError(
                    f"prompt_lengths: expected one for each of the {number} packed sequences, "
                    f"found {len(lengths)}"
                )
            _check_lengths(lengths, sizes)
            pooled = place < lengths[of_token]
        if self.mask is not None:
            if self.mask.shape != tokens.shape[:2]:
                raise PedroError(
                    f"prompt_mask: expected {list(tokens.shape[:2])}, found {list(self.mask.shape)}"
                )
            pooled = pooled & self.mask.to(tokens.device).flatten()
        counts = of_token[pooled].bincount(minlength=number)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise PedroError(f"packed sequences {shorten(empty)} have no prompt token to pool")
        chosen = pooled.nonzero().flatten()
        ends = counts.cumsum(0)
        if pooling == "last":
            return Packed(chosen[ends - 1][:, None], None, sequences)
        columns = torch.arange(int(counts.max()), device=tokens.device)
        mask = columns < counts[:, None]
        index = chosen[((ends - counts)[:, None] + columns).clamp(max=len(chosen) - 1)]
        return Packed(index, mask, sequences)

    def pooled_tokens(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Mask of the pooled tokens, bool `[B, S]`; None means every token.

        Args:
            tokens: the backbone's input, `[B, S, ...]`.
            attention_mask: the one the backbone is called with, in whatever form.
        """
        rows, width = tokens.shape[:2]
        prompt_width = width if self.width is None else self.width
        if width < prompt_width:
            raise PedroError(
                f"the prompt has {prompt_width} columns, but the backbone was called with the "
                f"first {width}: PEDRO reads a prompt in one forward pass; switch chunked prefill "
                "off, and gradient checkpointing while generating"
            )
        if self.attention_mask is not None:
            attention_mask = self._expand(self.attention_mask, rows)
        elif attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise PedroError(
                    "attention_mask: expected [B, S] with 1 at real tokens, found another form; "
                    "padding cannot be told from it"
                )
            if attention_mask.shape != (rows, width):
                raise PedroError(
                    f"attention_mask: expected {[rows, width]} without a filled KV cache, "
                    f"found {list(attention_mask.shape)}"
                )
            attention_mask = attention_mask[:, :prompt_width].bool()
        if attention_mask is None:
            if self.lengths is None and self.mask is None and width == prompt_width:
                return None
            attention_mask = torch.ones(rows, prompt_width, dtype=torch.bool, device=tokens.device)

        pooled = attention_mask
        if self.lengths is not None:
            lengths = self._expand(self.lengths, rows).to(pooled.device)
            _check_lengths(lengths, pooled.sum(dim=1))
            pooled = pooled & (pooled.cumsum(dim=1) <= lengths[:, None])
        if self.mask is not None:
            mask = self._expand(self.mask, rows).to(pooled.device)
            if mask.shape != pooled.shape:
                raise PedroError(
                    f"prompt_mask: expected {list(pooled.shape)}, found {list(mask.shape)}"
                )
            pooled = pooled & mask
        empty = (~pooled.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise PedroError(f"rows {shorten(empty)} have no prompt token to pool")
        return _pad_columns(pooled, width)

    def _expand(self, tensor: Tensor, rows: int) -> Tensor:
        if tensor.shape[0] == rows:
            return tensor
        if not self.expands or rows % tensor.shape[0]:
            raise PedroError(
                f"expected one prompt length, or row of a mask, for each of the {rows} rows of "
                f"the input, found {tensor.shape[0]}"
            )
        return tensor.repeat_interleave(rows // tensor.shape[0], dim=0)


def _pad_columns(mask: Tensor, width: int) -> Tensor:
    return nn.functional.pad(mask, (0, width - mask.shape[1]), value=False)


def _check_lengths(lengths: Tensor, available: Tensor) -> None:
    if bool(((lengths < 1) | (lengths > available)).any()):
        raise PedroError(
            "prompt_lengths: expected between 1 and the number of tokens in each row, "
            f"{available.tolist()}, found {lengths.tolist()}"
        )


def packed_sequences(position_ids: Tensor | None) -> Tensor | None:
    """Which packed sequence each token belongs to, `[B, S]`, numbered over all rows.

    The rule is that of transformers, which makes the attention mask from it: without an
    attention mask and a KV cache, a new sequence begins where positions do not go on by one.

    Returns:
        None where every row is one sequence.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    begins = torch.diff(position_ids, dim=-1) != 1
    if not bool(begins.any()):
        return None
    begins = nn.functional.pad(begins, (1, 0), value=True)
    return begins.flatten().cumsum(0).view_as(position_ids) - 1


def tokens_before_labels(labels: Tensor, real: Tensor | None, sequences: Tensor | None) -> Tensor:
    """The tokens before the first label of each sequence, bool `[B, S]`.

    Args:
        labels: `[B, S]`, -100 where there is none.
        real: `[B, S]`, False at padding; None for no padding.
        sequences: as `packed_sequences` gives them; None where every row is one.

    Raises:
        PedroError: a sequence's first token has a label, so it has no prompt.
    """
    rows, width = labels.shape
    if sequences is None:
        sequences = torch.arange(rows, device=labels.device)[:, None].expand(rows, width)
    sequences = sequences.to(labels.device)
    real = torch.ones_like(labels, dtype=torch.bool) if real is None else real.to(labels.device)
    places = torch.arange(rows * width, device=labels.device).view(rows, width)

    def first(chosen: Tensor) -> Tensor:
        found = torch.full((int(sequences.max()) + 1,), rows * width, device=labels.device)
        candidates = torch.where(chosen, places, rows * width).flatten()
        return found.scatter_reduce(0, sequences.flatten(), candidates, "amin")[sequences]

    first_label, first_token = first((labels != IGNORED_LABEL) & real), first(real)
    if bool((first_label <= first_token).logical_and(real).any()):
        raise PedroError(
            "labels begin at the first token of a sequence, so it has no prompt to pool: the "
            "adapter would learn for states that serving never makes. Give labels to completions "
            "alone (TRL: 'prompt' and 'completion' columns, or assistant_only_loss=True; "
            "elsewhere -100), or say with prompt_lengths what is pooled"
        )
    return (places < first_label) & real


@dataclass(frozen=True)
class Packed:
    """Where packed sequences are in the input.

    Attributes:
        index: `[N, P]`, their pooled tokens, counted over the flattened input.
        mask: bool `[N, P]`, False where a sequence pools fewer than P; None if none does.
        sequences: `[B, S]`, the sequence of each token.
    """

    index: Tensor
    mask: Tensor | None
    sequences: Tensor


def readers_from_pooled_token(
    tokens: Tensor, pooled: Tensor | None, packed: Packed | None
) -> Tensor:
    """Whose vectors each token reads in scope "answer", `[B, S]`: N before the pooled one.

    Args:
        tokens: the backbone's input, `[B, S, ...]`.
        pooled: as `Prompts.pooled_tokens` gives them; the last one counts.
        packed: where the sequences are, N of them, if rows hold several.
    """
    rows, width = tokens.shape[:2]
    places = torch.arange(rows * width, device=tokens.device).view(rows, width)
    if packed is not None:
        starts = packed.index[:, -1]
        sequences = packed.sequences
    else:
        sequences = torch.arange(rows, device=tokens.device)[:, None].expand(rows, width)
        if pooled is None:
            starts = places[:, -1]
        else:
            starts = torch.where(pooled.to(tokens.device), places, -1).amax(dim=1)
    return torch.where(places < starts[sequences], len(starts), sequences)
