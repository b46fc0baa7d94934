"""A text that is longer than a pass, a window at a time: each window reads the keys and values of
all before it, and what a pass holds is one window's activations beside them.

Loss and gradient are those of one pass over the whole text. The windows are first read without a
gradient; then, from the last to the first, each is read again and its loss taken back to its own
weights and to the keys and values before it. What these are owed is added to the loss of the window
that they come from, which is the chain rule cut at the keys and values. The masks of a parallel
draft stand after the window that what they see of the text ends in; no later window sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdistill.data.signal import positions_of
from specdistill.training.batches import Batch, idle
from specdistill.training.reward import credit_at

Pair = tuple[Tensor, Tensor]  # keys and values [1, H, L, D]


class _Layer(CacheLayerMixin):
    """One layer's keys and values before a window, and the window's own, `new`."""

    is_sliding = False  # the mask says what is seen

    def __init__(self) -> None:
        super().__init__()
        self.before: Pair | None = None
        self.new: Pair | None = None
        self.text: Pair | None = None  # all that were read, and what the loss owes them
        self.owed: Pair | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the window sees. A layer that is run again gives the same again."""
        self.new = key_states, value_states
        if self.before is None:
            return self.new
        keys, values = (torch.cat(both, 2) for both in zip(self.before, self.new, strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.before is None else self.before[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Prefix(Cache):
    """The keys and values of a text before a window of it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_Layer)
        self.span = slice(0, 0)

    def advance(self, span: slice) -> None:
        """What a pass without gradients has read of the text is before the next window."""
        for layer in self._layers:
            assert layer.new is not None
            keys, values = (part[:, :, : span.stop - span.start] for part in layer.new)
            if layer.before is not None:
                both = zip(layer.before, (keys, values), strict=True)
                keys, values = (torch.cat(parts, 2) for parts in both)
            layer.before = keys, values

    def rewind(self, span: slice) -> None:
        """Before a window that is read with gradients, behind all others that were."""
        self.span = span
        for layer in self._layers:
            if layer.text is None:
                layer.text = layer.before
                assert layer.text is not None
            layer.before = None
            if span.start:
                keys, values = (part[:, :, : span.start].detach() for part in layer.text)
                layer.before = keys.requires_grad_(), values.requires_grad_()

    def collect(self) -> None:
        """What the loss of this window owes to the keys and values before it."""
        for layer in self._layers:
            if layer.before is None:
                continue
            if layer.owed is None:
                keys, values = (_wide_zeros(part) for part in layer.before)
                layer.owed = keys, values
            for owed, part in zip(layer.owed, layer.before, strict=True):
                if part.grad is not None:
                    owed[:, :, : part.shape[2]] += part.grad

    def debt(self) -> Tensor | None:
        """Nothing, with the gradient that later windows owe to this one's keys and values; None in
        the last one.
        """
        terms = []
        for layer in self._layers:
            if layer.owed is not None:
                assert layer.new is not None
                for new, owed in zip(layer.new, layer.owed, strict=True):
                    due = owed[:, :, self.span]
                    terms.append((new[:, :, : due.shape[2]] * due).sum())  # masks are owed nothing
        if not terms:
            return None
        total = torch.stack(terms).sum()
        return total - total.detach()

    @property
    def _layers(self) -> list[_Layer]:
        return self.layers  # type: ignore[return-value]


def _wide_zeros(part: Tensor) -> Tensor:
    return torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))


def spans(batch: Batch, window: int | None, block: int = 1) -> list[slice]:
    """The windows of a batch, of at most `window` tokens and masks: several where it is one long
    text. The answer is cut at multiples of `block` tokens, or between the blocks of a parallel
    draft.
    """
    rows, length = batch.tokens.shape
    whole = batch.texts is not None or batch.prefix is not None
    if whole or window is None or rows > 1 or batch.shape[1] <= window:
        return [slice(0, length)]
    if batch.blocks is not None:
        cuts = _between_blocks(batch.blocks.rows_by_prefix(length).tolist(), window)
    else:
        step = max(window - window % block, block)
        first = int(batch.response[0].int().argmax())
        cuts = sorted({0, *range(first % step, length, step), length})
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _between_blocks(rows: list[int], window: int) -> list[int]:
    """Where windows begin and end: each holds as many of the rows as it can, a token with its masks
    at least, and one that pads.
    """
    cuts, used = [0], 1
    for place, needed in enumerate(rows):
        if used > 1 and used + needed > window:
            cuts.append(place)
            used = 1
        used += needed
    return [*cuts, len(rows)]


def pieces(
    batch: Batch, cuts: list[slice], read: Callable[[Batch], None], passes: int = 1
) -> Iterator[Batch]:
    """The windows of a batch of one text, the last one first, each behind its prefix; the batch
    itself where there is one. Each next is asked for after the backward pass of the one before.
    `read` passes over a window without a gradient. Where there are fewer than `passes` windows,
    passes that add nothing make up for them.
    """
    first = batch if len(cuts) == 1 else piece(batch, cuts[0], Prefix())
    spare = [idle(first)] * (passes - len(cuts))
    for part in spare:
        read(part)
    prefix = Prefix()
    text = replace(batch, blocks=None, weights=None)
    for span in cuts[:-1]:
        read(piece(text, span, prefix))
        prefix.advance(span)
    if len(cuts) == 1:
        yield batch
    else:
        for span in reversed(cuts):
            prefix.rewind(span)
            yield piece(batch, span, prefix)
            prefix.collect()
    yield from spare


def piece(batch: Batch, span: slice, prefix: Prefix) -> Batch:
    """A window of a batch of one text, behind its prefix. The rows of blocks learn from answer
    positions beyond their window, so they have those of the whole text.
    """
    part: slice | Tensor
    if batch.blocks is not None:
        blocks, part = batch.blocks.within(span, batch.tokens.shape[1])
        return replace(
            batch,
            tokens=batch.tokens[:, span],
            mask=batch.mask[:, span],
            response=batch.response[:, span],
            prefix=prefix,
            blocks=blocks,
            weights=None if batch.weights is None else batch.weights[part],
        )
    first, last = (int(batch.response[0, :end].sum()) for end in (span.start, span.stop))
    part = slice(first, last)
    return replace(
        batch,
        tokens=batch.tokens[:, span],
        mask=batch.mask[:, span],
        response=batch.response[:, span],
        labels=batch.labels[part],
        lengths=batch.lengths.new_tensor([last - first]),
        signal=None if batch.signal is None else positions_of(batch.signal, part),
        credit=credit_at(batch.credit, part),
        prefix=prefix,
    )
