"""Products with the weights of linear layers, packed once instead of on every call if that pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joined:
    """Linear layers of one input as one product [..., in] to [..., sum of out], by their own
    weights until `pack` is called.

    The stock float32 product on a CPU packs the weight anew on every call of more than three rows,
    so that a verify pass over five tokens costs twice a plain step; packed once, in MKL's layout,
    it costs about the same. Calls of more than `max_rows` rows take the stock product.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self.linears = linears
        self.max_rows = 0

    def pack(self, rows: int) -> None:
        """Keep a packed copy, tuned for `rows` rows a call; later changes of the weights are not
        seen by it.
        """
        weight = torch.cat([linear.weight.detach() for linear in self.linears])
        biases = [linear.bias.detach() for linear in self.linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        self.shape = weight.new_empty(1, 1).expand_as(weight)  # all that is asked of the original
        self.product = torch.ops.mkl._mkl_linear.default
        self.max_rows = 4 * rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows <= self.max_rows:
            return self.product(x, self.packed, self.shape, self.bias, rows)
        if len(self.linears) == 1:
            return self.linears[0](x)
        return torch.cat([linear(x) for linear in self.linears], -1)
