"""Linear layers for float32 inference on a CPU, packed once instead of on every call."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from specdistill.models import LanguageModel


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight in MKL's packed layout.

    The stock product packs the weight anew on every call of more than three rows, so that a verify
    pass over five tokens costs twice a plain step; packed once, it costs about the same. Calls of
    more than `max_rows` take the stock product.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.max_rows = 4 * rows
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows > self.max_rows:
            return super().forward(x)
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, rows)


def pack(language_model: LanguageModel, rows: int) -> LanguageModel:
    """Replace the linear layers of a float32 CPU model by packed ones tuned for `rows` tokens a
    call, and return it; other devices and dtypes stay as they are. Doubles the memory of the
    weights. For inference: the weights must not change afterwards."""
    where, kind = language_model.device.type, language_model.dtype
    if where != "cpu" or kind != torch.float32 or not torch.backends.mkl.is_available():
        return language_model
    for parent in list(language_model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, PackedLinear):
                setattr(parent, name, PackedLinear(child, rows))
    language_model.head = cast("nn.Linear", language_model.model.get_output_embeddings())
    return language_model
