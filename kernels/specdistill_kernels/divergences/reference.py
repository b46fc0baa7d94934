"""The distillation losses of one row of logits, in plain PyTorch, written to be read; every fast
path must agree with these in value and gradient.

p is the target's distribution and q the draft's at one position, both at temperature T; always this
way round. Over the tokens of the draft's vocabulary:

    fkl         T² Σ p log(p/q)                 word-level distillation (1503.02531, 1606.07947)
    rkl         T² Σ q log(q/p)                 mode seeking (2306.08543)
    jeffreys    T² [½ KL(p‖q) + ½ KL(q‖p)]      half of each
    jsd         T² [β KL(p‖m) + (1−β) KL(q‖m)]  m = βp + (1−β)q (2306.13649)
    skew_kl     T² KL(p‖λp + (1−λ)q)            DistiLLM (2402.03898), equation 1
    skew_rkl    T² KL(q‖λq + (1−λ)p)            the same, turned round
    tvd         ½ Σ|p−q| = 1 − α                α = Σ min(p, q), the acceptance rate (2211.17192)
    lk_alpha    −log α
    lk_hybrid   s T² KL(p‖q) + (1−s) tvd        s = exp(−η α), without gradient
    ce          −log q₁(y)                      q₁ = q at temperature 1, y the label

T² keeps the scale of the KL family's gradients (1503.02531, section 2.1). tvd and lk_alpha are the
acceptance rate itself: for them T is the temperature the draft will decode at, and nothing is
scaled. jsd at β = 0 is fkl and at β = 1 rkl, as in TRL and Liger-Kernel; the formula would give 0.

A draft whose vocabulary is trimmed has q = 0 for the tokens it lacks. With κ the mass p gives to
the others, fkl renormalises p over them and weighs the row by κ: κ KL(p/κ ‖ q), since unnormalised
the sum could fall below zero. jsd keeps β (1−κ) log(1/β) for the missing tokens and skew_kl
(1−κ) log(1/λ); rkl, skew_rkl, tvd and lk_alpha need nothing; ce is 0 where the label is missing.

A new loss is one function and one entry in `DIVERGENCES`.

A divergence that is infinite (p > 0 where q = 0 in fkl, q > 0 where p = 0 in rkl, nothing in common
in lk_alpha) is returned as infinity, and its gradient means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Outcomes(NamedTuple):
    """What both sides say of the same outcomes: the tokens of the draft's vocabulary, or k tokens
    and their tail. log_p, log_q: [n, m] at T; kept: [n], the mass of p on them all.
    """

    log_p: Tensor
    log_q: Tensor
    kept: Tensor
    temperature: float


def _under(weight: Tensor, value: Tensor) -> Tensor:
    """Σ weight · value, where a weight of 0 counts for nothing, in the gradients too."""
    return (weight * torch.where(weight > 0, value, 0)).sum(-1)


def _log_mix(o: Outcomes, share: float) -> Tensor:
    """log m of m = share · p + (1 − share) · q, 0 where both are 0."""
    m = share * o.log_p.exp() + (1 - share) * o.log_q.exp()
    return torch.where(m > 0, m, 1).log()


def _p_over_mix(o: Outcomes, log_m: Tensor, share: float) -> Tensor:
    kl = _under(o.log_p.exp(), o.log_p - log_m) - (1 - o.kept) * math.log(share)
    return o.temperature**2 * kl


def _q_over_mix(o: Outcomes, log_m: Tensor) -> Tensor:
    return o.temperature**2 * _under(o.log_q.exp(), o.log_q - log_m)


def fkl(o: Outcomes) -> Tensor:
    kl = _under(o.log_p.exp(), o.log_p - o.log_q) - torch.xlogy(o.kept, o.kept)
    return o.temperature**2 * kl


def rkl(o: Outcomes) -> Tensor:
    return o.temperature**2 * _under(o.log_q.exp(), o.log_q - o.log_p)


def jeffreys(o: Outcomes) -> Tensor:
    return (fkl(o) + rkl(o)) / 2


def jsd(o: Outcomes, beta: float) -> Tensor:
    log_m = _log_mix(o, beta)
    return beta * _p_over_mix(o, log_m, beta) + (1 - beta) * _q_over_mix(o, log_m)


def skew_kl(o: Outcomes, skew: float) -> Tensor:
    return _p_over_mix(o, _log_mix(o, skew), skew)


def skew_rkl(o: Outcomes, skew: float) -> Tensor:
    return _q_over_mix(o, _log_mix(o, 1 - skew))


def tvd(o: Outcomes) -> Tensor:
    """As Σ max(0, p − q), which does not cancel where p and q are close."""
    p, q = o.log_p.exp(), o.log_q.exp()
    return (p - torch.minimum(p, q)).sum(-1) + (1 - o.kept)


def lk_alpha(o: Outcomes) -> Tensor:
    """In logs, so that an acceptance rate too small for a float still has a gradient."""
    return -torch.minimum(o.log_p, o.log_q).logsumexp(-1)


def lk_hybrid(o: Outcomes, eta: float) -> Tensor:
    share = torch.exp(-eta * torch.exp(-lk_alpha(o))).detach()
    return share * fkl(o) + (1 - share) * tvd(o)


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of losses, by name. beta is jsd's β, skew the λ of skew_kl and skew_rkl, eta
    lk_hybrid's η.
    """

    weights: Mapping[str, float]
    beta: float
    skew: float
    eta: float


DIVERGENCES: dict[str, Callable[[Outcomes, Mixture], Tensor]] = {
    "fkl": lambda o, m: fkl(o),
    "rkl": lambda o, m: rkl(o),
    "jeffreys": lambda o, m: jeffreys(o),
    "jsd": lambda o, m: jsd(o, m.beta),
    "skew_kl": lambda o, m: skew_kl(o, m.skew),
    "skew_rkl": lambda o, m: skew_rkl(o, m.skew),
    "tvd": lambda o, m: tvd(o),
    "lk_alpha": lambda o, m: lk_alpha(o),
    "lk_hybrid": lambda o, m: lk_hybrid(o, m.eta),
}
LOSSES = (*DIVERGENCES, "ce")  # ce compares with a label, and needs no target


def mixture(
    loss: str | Mapping[str, float],
    beta: float | None = None,
    skew: float | None = None,
    eta: float | None = None,
) -> Mixture:
    """One loss, or weights by name, checked. Raises ValueError."""
    weights = {loss: 1.0} if isinstance(loss, str) else dict(loss)
    if not weights:
        raise ValueError("the loss is empty; give for instance {'fkl': 1.0}")
    for name, weight in weights.items():
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}; choose from {', '.join(LOSSES)}")
        if not 0 < weight < math.inf:
            raise ValueError(f"the weight of loss {name!r} must be above 0; got {weight}")
    if beta is not None and "jsd" not in weights:
        raise ValueError("beta belongs to the loss 'jsd', which is not part of this one")
    if skew is not None and not {"skew_kl", "skew_rkl"} & weights.keys():
        raise ValueError("skew belongs to 'skew_kl' and 'skew_rkl', no part of this loss")
    if eta is not None and "lk_hybrid" not in weights:
        raise ValueError("eta belongs to the loss 'lk_hybrid', which is not part of this one")
    beta, skew = 0.5 if beta is None else beta, 0.1 if skew is None else skew
    eta = 3.0 if eta is None else eta
    if not 0 <= beta <= 1 or not 0 < skew < 1 or not 0 <= eta < math.inf:
        raise ValueError(
            "beta must be in [0, 1], skew between 0 and 1 and eta at least 0; "
            f"got {beta}, {skew} and {eta}"
        )
    if "jsd" in weights and beta in (0, 1):
        limit = "fkl" if beta == 0 else "rkl"
        weights[limit] = weights.get(limit, 0.0) + weights.pop("jsd")
    return Mixture(weights, beta, skew, eta)


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
    return Outcomes(log_p, log_q, (own - whole).exp(), temperature)


def _lumped_outcomes(draft_logits: Tensor, target: Lumped, temperature: float) -> Outcomes:
    scaled = draft_logits / temperature
    present = target.columns >= 0
    outside = scaled.new_ones(len(scaled), scaled.shape[1] + 1, dtype=torch.bool)
    outside.scatter_(1, torch.where(present, target.columns, scaled.shape[1]), False)
    tail = torch.where(outside[:, :-1], scaled, -torch.inf).logsumexp(-1, keepdim=True)
    top = torch.where(present, scaled.gather(1, target.columns.clamp(min=0)), -torch.inf)
    # Of these outcomes alone: with another sum's rounding q would not add up to 1.
    log_q = torch.cat([top, tail], 1).log_softmax(-1)
    p = torch.cat([target.log_probs, target.log_tail[:, None]], 1).to(scaled.dtype)
    here = torch.cat([present, tail > -torch.inf], 1)
    kept = 1 - torch.where(here, 0, p.exp()).sum(-1)
    top_and_tail = torch.where(here, p, -torch.inf)
    return Outcomes(top_and_tail, log_q, kept.clamp(min=0), temperature)


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
    total = draft_logits.new_zeros(len(draft_logits))
    for name, weight in parts.weights.items():
        if name == "ce":
            assert labels is not None
            total = total + weight * ce(draft_logits, labels)
        else:
            total = total + weight * DIVERGENCES[name](o, parts)
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
