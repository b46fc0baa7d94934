"""Keys and values with a length per row. Rejecting tokens is a subtraction from the lengths the
caller keeps: nothing is copied, and what a stale slot holds is masked until it is overwritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdistill.models import LanguageModel

BUCKET = 64  # attention sees a multiple of this many slots, so that shapes repeat


class _RowLayer(CacheLayerMixin):
    """One layer's slots [B, H, L, D], written by position."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: CachedModel) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def slots(states: Tensor) -> Tensor:
            shape = (self.owner.batch, states.shape[1], self.owner.capacity, states.shape[3])
            return states.new_zeros(shape)

        self.keys, self.values = slots(key_states), slots(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self.owner
        out = []
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots[owner.rows[:, None], :, owner.positions] = states.transpose(1, 2)
            seen = slots[:, :, : owner.visible]
            out.append(seen[owner.rows] if owner.is_subset else seen)
        return out[0], out[1]

    def keep(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def copy_prefix(self, rows: Tensor, length: int) -> None:
        """The first `length` slots of rows[0] to all the rows."""
        for slots in (self.keys, self.values):
            slots[rows, :, :length] = slots[rows[0], :, :length].clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.visible, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.capacity


class CachedModel:
    """A model with slots for `batch` rows of up to `capacity` tokens."""

    def __init__(self, model: LanguageModel, batch: int, capacity: int) -> None:
        self.model = model
        self.batch = batch
        self.capacity = -(-capacity // BUCKET) * BUCKET
        self.visible = BUCKET
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)
        self.is_subset = False
        self.layers = [_RowLayer(self) for _ in range(model.num_layers)]
        self.cache = Cache(layers=list(self.layers))

    def run(
        self, tokens: Tensor, positions: Tensor, visible: int, rows: Tensor | None = None
    ) -> Tensor:
        """Process tokens [b, n] at positions [b, n] of the given rows (all by default); returns
        hidden states [b, n, d].

        Each query sees the slots up to its own position. `visible` is a number of slots, known on
        the host, above every position; it is rounded up to a bucket.
        """
        device = self.model.device
        self.is_subset = rows is not None
        self.rows = torch.arange(self.batch, device=device) if rows is None else rows
        self.positions = positions
        self.visible = min(-(-visible // BUCKET) * BUCKET, self.capacity)
        slots = torch.arange(self.visible, device=device)
        return self.model.hidden(
            tokens,
            position_ids=positions,
            attention_mask=attention_mask(self.model.config, slots, positions),
            past_key_values=self.cache,
            use_cache=True,
        )

    def prefill(self, rows: Tensor, prompts: list[list[int]], chunk: int = 512) -> None:
        """Write the prompts of some rows from position 0. What all of them begin with is computed
        once and copied. Shorter prompts repeat their last token at their last position, which
        writes the same values again.
        """
        device = self.model.device
        longest, shared = max(map(len, prompts)), common_prefix(prompts)
        tokens = torch.tensor(
            [p + p[-1:] * (longest - len(p)) if p else [0] * longest for p in prompts],
            device=device,
        )
        last = torch.tensor([max(len(p) - 1, 0) for p in prompts], device=device)[:, None]
        for start in range(0, shared, chunk):
            stop = min(start + chunk, shared)
            positions = torch.arange(start, stop, device=device)[None]
            self.run(tokens[:1, start:stop], positions, stop, rows[:1])
        for layer in self.layers if shared else ():
            layer.copy_prefix(rows, shared)
        for start in range(shared, longest, chunk):
            stop = min(start + chunk, longest)
            positions = torch.minimum(torch.arange(start, stop, device=device), last)
            self.run(tokens[:, start:stop], positions, stop, rows)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these; they are renumbered in this order."""
        index = torch.tensor(rows, device=self.model.device)
        for layer in self.layers:
            layer.keep(index)
        self.batch = len(rows)


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; 0 for a single prompt, which shares with nobody."""
    if len(prompts) == 1:
        return 0
    first, last = min(prompts), max(prompts)  # what the extremes of an order share, all share
    return next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )


def attention_mask(config: Any, slots: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
    """Boolean [b, 1, n, slots]: slot j is seen from position i if j <= i, and i - j < window in a
    sliding layer. Models that mix kinds of layers get a dict by kind, as they expect.
    """
    full = slots <= positions[:, None, :, None]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not window or kinds == {"full_attention"}:
        return full
    sliding = full & (slots > positions[:, None, :, None] - window)
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding
