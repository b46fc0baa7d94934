"""Attention in which the rows of a pass see others by a rule: by PyTorch's own, with a mask of
every pair, or on a GPU by FlexAttention, which leaves out the tiles that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdistill.decoding.cache import by_kind_of_layer
from specdistill.models import LanguageModel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Whether of batch row b (and head h) row q sees row k, by their numbers, as FlexAttention asks.
Sees = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
TILE = 128  # FlexAttention skips tiles of so many rows and columns
# Up to so many rows plain products ("eager") attend sooner than PyTorch's own attention on a CPU in
# bfloat16, in down to a third of the time (bench/LOG.md).
SHORT = 512


def whole_tiles(rows: int, device: torch.device) -> int:
    """Rows of a pass, filled up for FlexAttention where it is taken."""
    return -(-rows // TILE) * TILE if device.type == "cuda" else rows


def boolean_mask(sees: Sees, shape: torch.Size, device: torch.device, before: int = 0) -> Tensor:
    """[B, 1, S, P + S] for PyTorch's own attention, of a pass [B, S] behind P rows `before` it."""
    batch, rows = shape
    b, q, k = (torch.arange(size, device=device) for size in (batch, rows, before + rows))
    return sees(b[:, None, None], None, q[None, :, None], k[None, None])[:, None]


def block_mask(sees: Sees, shape: torch.Size, device: torch.device, before: int = 0) -> BlockMask:
    """The same for FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, rows = shape
    compiled = device.type == "cuda"
    return create_block_mask(sees, batch, None, rows, before + rows, device, _compile=compiled)


@contextmanager
def attending(
    model: LanguageModel, rule: Callable[[int | None], Sees], shape: torch.Size, before: int = 0
) -> Iterator[Any]:
    """The attention mask for a pass [B, S] of the model, which attends by the rule within it, to
    the rows in its cache `before` these too. The rule is asked for layers of a window, None where
    they have none.
    """
    kind, device = model.config._attn_implementation, model.device
    flex = _by_flex(model)

    def mask(window: int | None) -> Tensor | BlockMask:
        if flex:
            return block_mask(rule(window), shape, device, before)
        seen = boolean_mask(rule(window), shape, device, before)
        if kind != "eager":
            return seen
        unseen = torch.finfo(model.dtype).min
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, unseen)

    masks = by_kind_of_layer(model, mask)
    with attention_by(model, "flex_attention" if flex else kind):
        yield masks


@contextmanager
def attention_by(model: LanguageModel, kind: str) -> Iterator[None]:
    """Within it the model attends by Transformers' implementation of that name."""
    before = model.config._attn_implementation
    if kind == before:
        yield
        return
    model.model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.model.set_attn_implementation(before)


def _by_flex(model: LanguageModel) -> bool:
    """Where there is a GPU, and the family has it. PyTorch's own attention knows no soft cap of
    scores, and decoding takes that one, so a draft that has one is not trained by the other.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    known = getattr(model.model, "_supports_flex_attn", False)
    return model.device.type == "cuda" and bool(known) and not capped
