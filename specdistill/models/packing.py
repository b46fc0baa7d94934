"""Packing a model for inference on a CPU."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from specdistill.models import LanguageModel
from specdistill.models.packed_linear import Joined, packs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.product = Joined(linear)
        self.product.pack(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def unpacked(self) -> nn.Linear:
        """The layer as it was, with the same weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def pack(language_model: LanguageModel, rows: int) -> LanguageModel:
    """Pack the linear layers of a float32 or bfloat16 CPU model for `rows` tokens a call, and
    return it; other devices and dtypes stay as they are, and bfloat16 where the CPU does not
    multiply it. At least doubles the memory of the weights. For inference: the weights must not
    change afterwards.
    """
    if language_model.device.type != "cpu" or not packs(language_model.dtype):
        return language_model
    model, kind = language_model.model, language_model.dtype
    if kind == torch.bfloat16:  # logits are made in float32
        wide = language_model.wide_head or copy.deepcopy(language_model.head).float()
        language_model.wide_head = _packed(wide, rows)
    if language_model.body is None:
        _pack_layers(model, rows)
    else:
        language_model.body.pack(rows)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear) and kind == torch.float32:
            model.set_output_embeddings(_packed(head, rows))
    language_model.head = cast("nn.Linear", model.get_output_embeddings())
    return language_model


def widened(language_model: LanguageModel) -> LanguageModel:
    """A copy in float32, not packed; the model itself stays as it is. Takes the memory of both."""
    model = copy.deepcopy(language_model.model).float()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                setattr(parent, name, child.unpacked())
    return dataclasses.replace(language_model, model=model)


def _pack_layers(module: nn.Module, rows: int) -> None:
    """Replace every linear layer inside the module by a packed one."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _packed(child, rows))


def _packed(linear: nn.Linear, rows: int) -> nn.Linear:
    if isinstance(linear, PackedLinear):
        linear.product.pack(rows)
    elif type(linear) is nn.Linear:  # a subclass may compute something else
        return PackedLinear(linear, rows)
    return linear


def is_packed(language_model: LanguageModel) -> bool:
    """Whether `pack` has packed any of its weights."""
    modules = language_model.model.modules()
    packed_head = language_model.wide_head is not None
    return packed_head or any(isinstance(module, PackedLinear) for module in modules)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary linear layers of the same weights, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                linear = nn.Linear(child.in_features, child.out_features, device="meta")
                linear.weight, linear.bias = child.weight, child.bias
                setattr(parent, name, linear)
    return model
