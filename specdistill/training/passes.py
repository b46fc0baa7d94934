"""The passes of a training step over a batch: what states a model gives at the rows of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specdistill.data.signal import States
from specdistill.decoding.cache import attention_mask
from specdistill.drafts.making import decoder_layers
from specdistill.models import LanguageModel
from specdistill.training.attention import Sees, attending, attention_by
from specdistill.training.batches import Batch
from specdistill.training.last_layer import Forwards, forwards_of, only_at, running
from specdistill.training.parallel import states_of_blocks
from specdistill.training.windows import Prefix, piece, spans


def states_of(
    model: LanguageModel, batch: Batch, layers: list[int], window: int | None = None
) -> States:
    """[N, d], final and of `layers`, or the final ones [R, d] at the rows of blocks. A text of more
    than `window` tokens is read a window at a time, without a gradient: with one, see
    `Distiller.pieces`.
    """
    cuts = spans(batch, window)
    if len(cuts) == 1 and batch.blocks is not None:
        return States(states_of_blocks(model, batch.tokens, batch.blocks, batch.prefix))
    if len(cuts) == 1:
        rows = batch.response.flatten().nonzero()[:, 0]
        with _arguments(model, batch) as how, only_at(model, rows):
            return _states(model, batch.tokens, rows, layers, how)
    assert not torch.is_grad_enabled()
    prefix, parts = Prefix(), []
    for span in cuts:
        parts.append(states_of(model, piece(batch, span, prefix), layers))
        prefix.advance(span)
    inner = {layer: torch.cat([part.inner[layer] for part in parts]) for layer in layers}
    return States(torch.cat([part.hidden for part in parts]), inner=inner)


def _states(
    model: LanguageModel, tokens: Tensor, rows: Tensor, layers: list[int], how: dict[str, Any]
) -> States:
    if not layers:
        return States(model.hidden(tokens, **how).flatten(0, 1)[rows])
    wanted = [*layers, model.num_layers]
    passed = model.hidden_after(tokens, wanted, **how)
    by_layer = [states.flatten(0, 1)[rows] for states in passed]
    return States(by_layer[-1], inner=dict(zip(layers, by_layer[:-1], strict=True)))


@contextmanager
def _arguments(model: LanguageModel, batch: Batch) -> Iterator[dict[str, Any]]:
    """What the model is told of a batch's tokens."""
    if batch.prefix is not None:
        start = batch.prefix.get_seq_length()
        slots = torch.arange(start + batch.tokens.shape[1], device=model.device)
        positions = slots[None, start:]
        yield {
            "position_ids": positions,
            "attention_mask": attention_mask(model, slots, positions),
            "past_key_values": batch.prefix,
            "use_cache": True,
        }
    elif batch.texts is not None:
        with attending(model, partial(same_text, batch.texts), batch.tokens.shape) as mask:
            yield {
                "position_ids": positions_in(batch.texts),
                "attention_mask": mask,
                "use_cache": False,
            }
    else:  # without a cache, to which a layer that is run again would add its keys again
        yield {"attention_mask": batch.mask, "use_cache": False}


def same_text(texts: Tensor, window: int | None) -> Sees:
    """Of a row of several texts [B, S]: a token sees those before it of its own."""

    def sees(b: Tensor, h: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        seen = (texts[b, q] == texts[b, k]) & (k <= q)
        return seen if window is None else seen & (q - k < window)

    return sees


def positions_in(texts: Tensor) -> Tensor:
    """[B, S] the place of each token in its text."""
    place = torch.arange(texts.shape[1], device=texts.device).expand_as(texts)
    begins = torch.ones_like(texts, dtype=torch.bool)
    begins[:, 1:] = texts[:, 1:] != texts[:, :-1]
    return place - place.where(begins, 0).cummax(1).values


def after(layer: int, model: LanguageModel, states: States) -> Tensor:
    return states.hidden if layer == model.num_layers else states.inner[layer]


@contextmanager
def recomputed(draft: LanguageModel) -> Iterator[None]:
    """Within it the layers keep no activations for the backward pass, but are run again there
    (1604.06174), in the way of their own pass.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        kind, forwards = draft.config._attn_implementation, forwards_of(draft)
        return nullcontext(), _again(draft, kind, forwards)

    layers = decoder_layers(draft)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


@contextmanager
def _again(draft: LanguageModel, kind: str, forwards: Forwards) -> Iterator[None]:
    with attention_by(draft, kind), running(forwards):
        yield
