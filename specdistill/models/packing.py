"""Packing a model's weights for decoding on a CPU, which a decoder does on first use. The copies
belong to the products of the model's lean pass and of its head; a model that runs by Transformers'
own pass gets linear layers that have them.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import TypeVar

from torch import Tensor, nn

from specdistill.models import LanguageModel
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
    trained = any(parameter.requires_grad for parameter in model.model.parameters())
    if trained or model.device.type != "cpu" or not packs(model.dtype):
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
