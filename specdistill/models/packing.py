"""Packing a model's weights for decoding on a CPU, which a decoder does on first use. The copies
belong to the products of the model's lean pass and of its head; a model that runs by Transformers'
own pass gets linear layers that have them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from specdistill.models import LanguageModel
from specdistill.models.language_model import multiplies_wide
from specdistill.models.memory import free_bytes
from specdistill.models.packed_linear import Joined, packs

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.product = Joined(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


def pack(model: LanguageModel, rows: int) -> None:
    """Pack the weights of a model for passes over `rows` tokens, which at least doubles their
    memory: once, and again where they have changed or the copy is tuned for fewer rows. Nothing is
    packed on other devices, in dtypes that no library here packs, in training, where weights
    change, and, with a warning, where memory does not suffice.
    """
    if not _packs(model):
        for product in _layer_products(model):
            product.unpack()
        model.unpack_head()
        return
    if model.body is None:
        _replace_linears(model)
    missing = [product for product in _products(model) if not product.serves(rows)]
    needed = sum(product.nbytes for product in missing)
    if needed and needed > (free := free_bytes(model.device)):
        warnings.warn(
            f"{model.name} decodes more slowly than it could: packed copies of its weights take "
            f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
            stacklevel=2,
        )
        return
    for product in missing:
        product.pack(rows)


def packing_bytes(model: LanguageModel) -> int:
    """About what the first decoding takes for copies of the weights: one in float32 of a head in
    half precision, and those that `pack` makes.
    """
    head: Tensor = model.head.weight
    with torch.no_grad():  # as decoding does
        copied = head.dtype.itemsize < 4 and not multiplies_wide(head)
    wide = 4 * head.numel() if copied else 0
    if not _packs(model):
        return wide
    if model.body is not None:
        layers = sum(product.nbytes for product in model.body.products())
    else:
        modules = (m for m in model.model.modules() if m is not model.head)
        layers = sum(m.weight.nbytes for m in modules if isinstance(m, nn.Linear))
    return wide + layers + max(wide, head.nbytes)


def _packs(model: LanguageModel) -> bool:
    trained = any(parameter.requires_grad for parameter in model.model.parameters())
    return not trained and model.device.type == "cpu" and packs(model.dtype)


def _products(model: LanguageModel) -> list[Joined]:
    return [*_layer_products(model), model.head_product()]


def _layer_products(model: LanguageModel) -> list[Joined]:
    """Those of its lean pass, or of its linear layers."""
    if model.body is not None:
        return model.body.products()
    return [m.product for m in model.model.modules() if isinstance(m, PackedLinear)]


def _replace_linears(model: LanguageModel) -> None:
    for parent, name, child in _children(model.model):
        # A subclass may compute something else.
        if type(child) is nn.Linear and child is not model.head:
            setattr(parent, name, PackedLinear(child))


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every module within, after the one that has it and its name there."""
    return [(parent, *named) for parent in model.modules() for named in parent.named_children()]


def is_packed(model: LanguageModel) -> bool:
    """Whether any of its weights has a packed copy."""
    return any(product.product is not None for product in _products(model))


def unpacked(model: Module) -> Module:
    """The model with ordinary linear layers of the same weights, in place."""
    for parent, name, child in _children(model):
        if isinstance(child, PackedLinear):
            setattr(parent, name, child.product.linears[0])
    return model


def widened(model: LanguageModel) -> LanguageModel:
    """A copy in float32, not packed; the model itself stays as it is. Takes the memory of both."""
    wide = unpacked(copy.deepcopy(model.model)).float()
    return dataclasses.replace(model, model=wide)
