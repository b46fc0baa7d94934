"""Attention of Transformers' own layers over kept slots, where heads share keys: these heads are
further queries of one head, and keys and values are read where they lie. Transformers' `sdpa` gives
every head a copy of them in a pass over several tokens, since of PyTorch's fused kernels none but
cuDNN's takes shared heads beside a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_of_shared_heads"


@contextmanager
def of_shared_heads(model: PreTrainedModel) -> Iterator[None]:
    """Within it, passes with a mask [B, 1, n, L] attend so where a model's layers attend by `sdpa`
    and say that others may take its place.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not model.is_backend_compatible():
        yield
        return
    _register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Queries [B, H, n, D], keys and values [B, H / sharing, L, D] to [B, n, H, D]; what `sdpa`
    knows beside a mask of all heads and a scale is left to it.
    """
    from transformers import AttentionInterface

    batch, heads, new, _ = query.shape
    kv_heads = key.shape[1]
    others = any(options.get(name) is not None for name in ("softcap", "position_bias"))
    if heads == kv_heads or attention_mask is None or attention_mask.shape[1] > 1 or others:
        attend = AttentionInterface()["sdpa"]
        return attend(module, query, key, value, attention_mask, **options)
    sharing = heads // kv_heads
    mask = attention_mask.expand(-1, sharing, -1, -1)
    out = F.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, sharing * new, -1),
        key,
        value,
        attn_mask=mask.flatten(1, 2)[:, None],
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None
