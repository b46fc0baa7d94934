"""The last layer of a draft at the rows that are read. Of all other rows a later token needs keys
and values alone; in a draft of two layers the rest is nearly half of a pass over a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from specdistill.drafts.making import decoder_layers
from specdistill.models import LanguageModel

# By their names in a layer of Transformers' families; what each gives for a row is of that row.
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
Forwards = dict[nn.Module, Callable[..., Tensor]]


@contextmanager
def only_at(model: LanguageModel, rows: Tensor) -> Iterator[None]:
    """Within it the last layer of a pass [B, L] asks and feeds forward at `rows` alone, counted
    through the batch, no two the same: its states at others mean nothing. What is read at `rows`,
    and every gradient of it, is that of the whole pass.
    """
    parts = filter(is_by_row, parts_of(model)) if len(rows) else ()
    with running({part: partial(_at, rows, part.forward) for part in parts}):
        yield


@contextmanager
def running(forwards: Forwards) -> Iterator[None]:
    """Within it these modules run these functions."""
    for part, forward in forwards.items():
        part.forward = forward
    try:
        yield
    finally:
        for part in forwards:
            del part.forward  # the class's own again


def forwards_of(model: LanguageModel) -> Forwards:
    """What the last layer's parts run in the pass that is under way."""
    return {part: part.forward for part in parts_of(model) if "forward" in vars(part)}


def parts_of(model: LanguageModel) -> list[nn.Module]:
    modules = dict(decoder_layers(model)[-1].named_modules())
    return [modules[name] for name in PARTS if name in modules]


def is_by_row(part: nn.Module) -> bool:
    """Whether its weights are of linear layers alone: not of a mixture of experts, say."""
    owners = (m for m in part.modules() if next(m.parameters(recurse=False), None) is not None)
    return all(isinstance(owner, nn.Linear) for owner in owners)


def _at(rows: Tensor, forward: Callable[..., Tensor], states: Tensor, *more: Any) -> Tensor:
    """What a part's own `forward` gives, [B, L, e], at `rows`, and 0 elsewhere."""
    if more:  # such as the place of each row
        return forward(states, *more)
    result = forward(states.flatten(0, 1)[None, rows])[0]
    whole = result.new_zeros(states.shape[:2].numel(), result.shape[-1])
    return whole.index_copy(0, rows, result).view(*states.shape[:2], -1)
