"""The passes of a training step over a batch: what states a model gives at the rows of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specdistill.data.signal import States
from specdistill.models import LanguageModel
from specdistill.training.batches import Batch


def states_of(model: LanguageModel, tokens: Tensor, batch: Batch, layers: list[int]) -> States:
    """[N, d], final and of `layers`. Without a cache, to which a layer that is run again would add
    its keys again.
    """
    how = {"attention_mask": batch.mask, "use_cache": False}
    if not layers:
        return States(model.hidden(tokens, **how)[batch.response])
    wanted = [*layers, model.num_layers]
    by_layer = [states[batch.response] for states in model.hidden_after(tokens, wanted, **how)]
    return States(by_layer[-1], inner=dict(zip(layers, by_layer[:-1], strict=True)))


def after(layer: int, model: LanguageModel, states: States) -> Tensor:
    return states.hidden if layer == model.num_layers else states.inner[layer]


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the layers keep no activations for the backward pass, but are run again there
    (1604.06174).
    """
    layers = list(layers)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again
