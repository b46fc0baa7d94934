"""The distillation losses of one row of logits, in plain PyTorch, written to be read; every fast
path must agree with these in value and gradient.

p is the target's distribution and q the draft's at one position, both at temperature T; always this
way round. Over the tokens of the draft's vocabulary:

    fkl         T² Σ p log(p/q)                 word-level distillation (1503.02531, 1606.07947)
    rkl         T² Σ q log(q/p)                 mode seeking (2306.08543)
    jsd         T² [β KL(p‖m) + (1−β) KL(q‖m)]  m = βp + (1−β)q (2306.13649)
    tvd         ½ Σ|p−q| = 1 − α                α = Σ min(p, q), the acceptance rate (2211.17192)
    lk_alpha    −log α
    lk_hybrid   λ T² KL(p‖q) + (1−λ) tvd        λ = exp(−η α), without gradient
    ce          −log q₁(y)                      q₁ = q at temperature 1, y the label

T² keeps the scale of the KL family's gradients (1503.02531, section 2.1). tvd and lk_alpha are the
acceptance rate itself: for them T is the temperature the draft will decode at, and nothing is
scaled. jsd at β = 0 is fkl and at β = 1 rkl, as in TRL and Liger-Kernel; the formula would give 0.

A draft whose vocabulary is trimmed has q = 0 for the tokens it lacks. With κ the mass p gives to
the others, fkl renormalises p over them and weighs the row by κ: κ KL(p/κ ‖ q), since unnormalised
the sum could fall below zero. jsd keeps β (1−κ) log(1/β) for the missing tokens; rkl, tvd and
lk_alpha need nothing; ce is 0 where the label is missing.

A divergence that is infinite (p > 0 where q = 0 in fkl, q > 0 where p = 0 in rkl, nothing in common
in lk_alpha) is returned as infinity, and its gradient means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Loss = Literal["fkl", "rkl", "jsd", "tvd", "lk_alpha", "lk_hybrid", "ce"]
LOSSES: tuple[Loss, ...] = ("fkl", "rkl", "jsd", "tvd", "lk_alpha", "lk_hybrid", "ce")


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of losses, by name. beta is jsd's β, eta lk_hybrid's η."""

    weights: Mapping[Loss, float]
    beta: float
    eta: float


def mixture(
    loss: Loss | Mapping[Loss, float], beta: float | None = None, eta: float | None = None
) -> Mixture:
    """One loss, or weights by name, checked. Raises ValueError."""
    weights: dict[Loss, float] = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    if not weights:
        raise ValueError("the loss is empty; give for instance {'fkl': 1.0}")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; choose from {', '.join(LOSSES)}")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of loss {name!r} must be above 0; got {weight}")
    if beta is not None and "jsd" not in weights:
        raise ValueError("beta belongs to the loss 'jsd', which is not part of this one")
    if eta is not None and "lk_hybrid" not in weights:
        raise ValueError("eta belongs to the loss 'lk_hybrid', which is not part of this one")
    beta, eta = 0.5 if beta is None else beta, 3.0 if eta is None else eta
    if not 0 <= beta <= 1 or not 0 <= eta < math.inf:
        raise ValueError(f"beta must be in [0, 1] and eta at least 0; got {beta} and {eta}")
    if "jsd" in weights and beta in (0, 1):
        limit: Loss = "fkl" if beta == 0 else "rkl"
        weights[limit] = weights.get(limit, 0.0) + weights.pop("jsd")
    return Mixture(weights, beta, eta)


class Outcomes(NamedTuple):
    """What both sides say of the same outcomes: the tokens of the draft's vocabulary, or k tokens
    and their tail. log_p, log_q: [n, m] at T; kept: [n], the mass of p on them all.
    """

    log_p: Tensor
    log_q: Tensor
    kept: Tensor


def _under(weight: Tensor, value: Tensor) -> Tensor:
    """Σ weight · value, where a weight of 0 counts for nothing, in the gradients too."""
    return (weight * torch.where(weight > 0, value, 0)).sum(-1)


def fkl(o: Outcomes) -> Tensor:
    return _under(o.log_p.exp(), o.log_p - o.log_q) - torch.xlogy(o.kept, o.kept)


def rkl(o: Outcomes) -> Tensor:
    return _under(o.log_q.exp(), o.log_q - o.log_p)


def jsd(o: Outcomes, beta: float) -> Tensor:
    p, q = o.log_p.exp(), o.log_q.exp()
    m = beta * p + (1 - beta) * q
    log_m = torch.where(m > 0, m, 1).log()
    of_p = _under(p, o.log_p - log_m) - (1 - o.kept) * math.log(beta)
    return beta * of_p + (1 - beta) * _under(q, o.log_q - log_m)


def tvd(o: Outcomes) -> Tensor:
    """As Σ max(0, p − q), which does not cancel where p and q are close."""
    p, q = o.log_p.exp(), o.log_q.exp()
    return (p - torch.minimum(p, q)).sum(-1) + (1 - o.kept)


def lk_alpha(o: Outcomes) -> Tensor:
    """In logs, so that an acceptance rate too small for a float still has a gradient."""
    return -torch.minimum(o.log_p, o.log_q).logsumexp(-1)


def lk_hybrid(o: Outcomes, eta: float, temperature: float) -> Tensor:
    weight = torch.exp(-eta * torch.exp(-lk_alpha(o))).detach()
    return weight * temperature**2 * fkl(o) + (1 - weight) * tvd(o)


def ce(draft_logits: Tensor, labels: Tensor) -> Tensor:
    """labels: [n] columns of draft_logits, -1 where the draft lacks the token."""
    of_label = draft_logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, draft_logits.logsumexp(-1) - of_label, 0)


class Dense(NamedTuple):
    """The target's raw logits [n, Vd] of the draft's tokens; logsumexp: [n], of all its logits / T,
    None where the draft has every token.
    """

    logits: Tensor
    logsumexp: Tensor | None


class Lumped(NamedTuple):
    """The target's k most probable tokens at T and the log of the mass of all others, the tail.

    columns: [n, k] places in the draft's logits, -1 where it lacks the token; log_probs: [n, k];
    log_tail: [n]. The tail is one outcome, and counts as missing where the draft has no token
    outside the k.
    """

    columns: Tensor
    log_probs: Tensor
    log_tail: Tensor


def _dense_outcomes(draft_logits: Tensor, target: Dense, temperature: float) -> Outcomes:
    q = draft_logits / temperature
    p = wide(target.logits) / temperature
    own = p.logsumexp(-1)
    # A stored logsumexp was rounded elsewhere; it cannot be below the part of the sum seen here.
    whole = own if target.logsumexp is None else torch.maximum(own, target.logsumexp.to(own.dtype))
    # Both sides by the same steps, so that equal logits give exactly equal probabilities: overlap
    # losses have a kink there.
    log_p, log_q = p - whole[:, None], q - q.logsumexp(-1, keepdim=True)
    return Outcomes(log_p, log_q, (own - whole).exp())


def _lumped_outcomes(draft_logits: Tensor, target: Lumped, temperature: float) -> Outcomes:
    scaled = draft_logits / temperature
    present = target.columns >= 0
    outside = scaled.new_ones(len(scaled), scaled.shape[1] + 1, dtype=torch.bool)
    outside.scatter_(1, torch.where(present, target.columns, scaled.shape[1]), False)
    tail = torch.where(outside[:, :-1], scaled, -torch.inf).logsumexp(-1, keepdim=True)
    top = torch.where(present, scaled.gather(1, target.columns.clamp(min=0)), -torch.inf)
    log_q = torch.cat([top, tail], 1) - scaled.logsumexp(-1, keepdim=True)
    p = torch.cat([target.log_probs, target.log_tail[:, None]], 1).to(scaled.dtype)
    here = torch.cat([present, tail > -torch.inf], 1)
    kept = 1 - torch.where(here, 0, p.exp()).sum(-1)
    return Outcomes(torch.where(here, p, -torch.inf), log_q, kept.clamp(min=0))


def row_losses(
    draft_logits: Tensor,
    target: Dense | Lumped | None,
    labels: Tensor | None,
    parts: Mixture,
    temperature: float,
) -> Tensor:
    """[n] weighted sums of losses, from raw float32 or float64 draft logits [n, Vd]. target may be
    None for ce alone, labels (as in `ce`) where it takes no part.
    """
    if isinstance(target, Dense):
        o = _dense_outcomes(draft_logits, target, temperature)
    elif isinstance(target, Lumped):
        o = _lumped_outcomes(draft_logits, target, temperature)
    squared = temperature**2
    total = draft_logits.new_zeros(len(draft_logits))
    for name, weight in parts.weights.items():
        match name:
            case "fkl":
                value = squared * fkl(o)
            case "rkl":
                value = squared * rkl(o)
            case "jsd":
                value = squared * jsd(o, parts.beta)
            case "tvd":
                value = tvd(o)
            case "lk_alpha":
                value = lk_alpha(o)
            case "lk_hybrid":
                value = lk_hybrid(o, parts.eta, temperature)
            case "ce":
                assert labels is not None
                value = ce(draft_logits, labels)
        total = total + weight * value
    return total


def row_gradients(
    draft_logits: Tensor,
    target: Dense | Lumped | None,
    labels: Tensor | None,
    weights: Tensor,
    parts: Mixture,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Weighted `row_losses` [n] of draft logits in any float dtype, and their gradient [n, Vd]."""
    with torch.enable_grad():
        leaf = wide(draft_logits.detach()).requires_grad_()
        losses = row_losses(leaf, target, labels, parts, temperature) * weights
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient.to(draft_logits.dtype)


def logsumexp(logits: Tensor, temperature: float) -> Tensor:
    """[n, V] raw logits in any float dtype to [n], of logits / T."""
    return (wide(logits) / temperature).logsumexp(-1)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
