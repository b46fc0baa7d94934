"""Products with the weights of linear layers, packed once instead of on every call if that pays."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
Version = tuple[int, int, int, bool]
FULL_ROWS = 5  # of oneDNN: weights out of the cache are read fastest for four to six rows at once


class Joined:
    """Linear layers of one input as one product [..., in] to [..., sum of out], by their own
    weights until `pack` is called.

    The stock float32 product on a CPU packs the weight anew on every call of more than three rows,
    so that a verify pass over five tokens costs twice a plain step; packed once it costs about the
    same.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self.linears = linears
        self.product: Product | None = None  # by the packed copy
        self.max_rows = 0.0  # a call, that it is used for
        self.most_rows = 0.0  # a call, that it is tuned for
        self.versions: list[Version] = []  # of the weights that were packed

    def pack(self, rows: int) -> None:
        """Keep a packed copy, tuned for `rows` rows a call; later changes of the weights are not
        seen by it.
        """
        self.unpack()  # the old copy goes before the new one is made
        weight = torch.cat([linear.weight.detach() for linear in self.linears])
        biases = [linear.bias.detach() for linear in self.linears if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        if _library(weight.dtype) == "MKL":
            self.product = _by_mkl(weight, bias, rows)
            self.most_rows, self.max_rows = rows, 4 * rows
        else:
            self.product = _by_onednn(weight, bias, rows)
            self.most_rows = self.max_rows = math.inf
        self.versions = self._versions()

    def unpack(self) -> None:
        """Drop the packed copy."""
        self.product, self.max_rows, self.most_rows, self.versions = None, 0, 0, []

    @property
    def nbytes(self) -> int:
        """Of the weights, and about those of a packed copy."""
        return sum(linear.weight.nbytes for linear in self.linears)

    def serves(self, rows: int) -> bool:
        """Whether there is a packed copy of the weights as they are now, tuned for so many rows."""
        return rows <= self.most_rows and self.versions == self._versions()

    def _versions(self) -> list[Version]:
        return [version(linear.weight) for linear in self.linears]

    def __call__(self, x: Tensor) -> Tensor:
        if (product := self._product_for(x)) is not None:
            return product(x)
        if len(self.linears) == 1:
            return self.linears[0](x)
        return torch.cat([linear(x) for linear in self.linears], -1)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """[..., in] to the [..., out] of each layer, which are not copied to lie side by side."""
        if (product := self._product_for(x)) is not None:
            return product(x).split([linear.out_features for linear in self.linears], -1)
        return [linear(x) for linear in self.linears]

    def _product_for(self, x: Tensor) -> Product | None:
        return self.product if x.numel() // x.shape[-1] <= self.max_rows else None


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with these very tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    for name, part in (("weight", weight), ("bias", bias)):
        if part is not None and not isinstance(part, nn.Parameter):
            part = nn.Parameter(part, requires_grad=False)
        setattr(linear, name, part)
    return linear


def version(weight: Tensor) -> Version:
    """What changes when a weight does."""
    count = -1 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), count, weight.requires_grad


def packs(dtype: torch.dtype) -> bool:
    """Whether this CPU has a library that packs weights of a dtype."""
    return _library(dtype) is not None


def _library(dtype: torch.dtype) -> str | None:
    """MKL is faster at one row in float32, but only on Intel's CPUs: on AMD's it takes two to four
    times as long as oneDNN for the rows of a verify pass. Other architectures were not measured.
    """
    intel = "intel" in str(torch.cpu.get_capabilities().get("cpu_name")).lower()
    if dtype == torch.float32 and intel and torch.backends.mkl.is_available():
        return "MKL"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not x86 or not torch.backends.mkldnn.is_available():
        return None
    native = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "oneDNN" if dtype == torch.float32 or native else None


def _by_mkl(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """For up to four times `rows` rows; beyond, the stock product is faster."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    shape = weight.new_empty(1, 1).expand_as(weight)  # all that is asked of the original
    product = torch.ops.mkl._mkl_linear.default
    return lambda x: product(x, packed, shape, bias, x.numel() // x.shape[-1])


def _by_onednn(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """Faster than the stock product for any number of rows from `FULL_ROWS` on. Fewer are filled up
    with zeros: that takes less time than they take alone, and a single row would be rounded
    otherwise than among others.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, max(rows, FULL_ROWS))
    product = torch.ops.mkldnn._linear_pointwise.default

    def run(x: Tensor) -> Tensor:
        count = x.numel() // x.shape[-1]
        if count >= FULL_ROWS:
            return product(x, packed, bias, "none", [], "")
        full = x.new_zeros(FULL_ROWS, x.shape[-1])
        full[:count] = x.reshape(count, -1)
        out = product(full, packed, bias, "none", [], "")
        return out[:count].view(*x.shape[:-1], -1)

    return run
