"""The distillation losses, per position. p is the target's distribution, q the draft's, always this
way round.

Adding one is one function and one entry in `DIVERGENCES`. A draft whose vocabulary is trimmed sees
the target's logits of the kept tokens only, and `kept_mass`, the probability p gives to them all (1
without trimming).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdistill.errors import InputError


@dataclass(frozen=True)
class Positions:
    """What the target says at N positions. logits: [N, Vd] raw, over the draft's vocabulary.
    labels: [N] index of the token that follows in that vocabulary, -1 where it is missing.
    kept_mass: [N], at the distillation temperature.
    """

    logits: Tensor
    labels: Tensor
    kept_mass: Tensor


Divergence = Callable[[Positions, Tensor, float], Tensor]


def fkl(target: Positions, draft_logits: Tensor, temperature: float) -> Tensor:
    """Forward KL Σ p log(p/q), [N]: supervised and word-level distillation (Hinton 1503.02531; Kim
    & Rush 1606.07947).

    With a trimmed vocabulary p is renormalised over the kept tokens and the position weighted by
    their mass: unnormalised, the sum could fall below zero. Times T², so that gradients keep their
    scale.
    """
    log_p = torch.log_softmax(target.logits / temperature, -1)
    log_q = torch.log_softmax(draft_logits / temperature, -1)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)
    return temperature**2 * target.kept_mass * terms.sum(-1)


def ce(target: Positions, draft_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy −log q(y), [N], at temperature 1 whatever `temperature` says; 0 where the draft
    lacks the token.
    """
    loss = torch.nn.functional.cross_entropy(
        draft_logits, target.labels.clamp(min=0), reduction="none"
    )
    return torch.where(target.labels >= 0, loss, 0)


DIVERGENCES: dict[str, Divergence] = {"fkl": fkl, "ce": ce}


def mixture(weights: Mapping[str, float]) -> Divergence:
    """A weighted sum, for instance {"fkl": 0.9, "ce": 0.1}. Raises `InputError` for an unknown name
    or a bad weight.
    """
    for name, weight in weights.items():
        if name not in DIVERGENCES:
            raise InputError(f"unknown loss {name!r}; choose from {', '.join(sorted(DIVERGENCES))}")
        if not 0 < weight < float("inf"):
            raise InputError(f"the weight of loss {name!r} must be above 0; got {weight}")
    if not weights:
        raise InputError("the loss is empty; give for instance {fkl: 1.0}")

    def weighted(target: Positions, draft_logits: Tensor, temperature: float) -> Tensor:
        parts = [
            weight * DIVERGENCES[name](target, draft_logits, temperature)
            for name, weight in weights.items()
        ]
        return torch.stack(parts).sum(0)

    return weighted


class _Chunked(torch.autograd.Function):
    """Σ over rows of a loss of the logits, by chunks: logits, loss and gradients live for one chunk
    at a time.
    """

    @staticmethod
    def forward(ctx, hidden, loss_of_rows, chunk, *head):  # type: ignore[no-untyped-def]
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grads = []
        head_grads = [torch.zeros_like(part) for part in head]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_()
                parts = [part.detach().requires_grad_() for part in head]
                logits = torch.nn.functional.linear(leaf, *parts)
                loss = loss_of_rows(
                    logits.float() if logits.dtype != torch.float64 else logits, rows
                ).sum()
            grads = torch.autograd.grad(loss, [leaf, *parts])
            total = total + loss.detach()
            hidden_grads.append(grads[0])
            for kept, grad in zip(head_grads, grads[1:], strict=True):
                kept += grad
        ctx.save_for_backward(torch.cat(hidden_grads), *head_grads)
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        hidden, *head = ctx.saved_tensors
        return (hidden * upstream, None, None, *(part * upstream for part in head))


def chunked_sum(
    hidden: Tensor, head: list[Tensor], loss_of_rows: Callable[[Tensor, slice], Tensor], chunk: int
) -> Tensor:
    """Σ of `loss_of_rows(logits [n, V], rows)` over the rows of `hidden` [N, d], never holding more
    than `chunk` rows of logits. head: weight [V, d] and, where there is one, bias [V]. Equal to the
    plain sum in value and gradients.
    """
    return _Chunked.apply(hidden, loss_of_rows, chunk, *head)
