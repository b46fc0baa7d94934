"""Speculative sampling in plain PyTorch, written to be read; every other backend must agree with it
token for token.

Shapes: B requests, G draft positions, V target vocabulary, Vd draft vocabulary (Vd = V unless
`draft_vocab` is given). p is the target's distribution, q the draft's. Sources: Leviathan et al.
2211.17192 (Algorithm 1), Chen et al. 2302.01318.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdistill_kernels.noise import COIN, DRAFT, FINAL, Noise, coin, exponential


class Verdict(NamedTuple):
    tokens: Tensor  # [B, G+1] int64: accepted prefix, one residual or bonus token, then -1
    num_accepted: Tensor  # [B] int64


def probabilities(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The distribution a token is drawn from: [B, ..., V] raw logits to float32 (float64 stays)
    probabilities.

    Per row, in this order: temperature (0 = one-hot on the first maximum), top-k (0 = off),
    renormalise, top-p (1 = off), min-p (0 = off), renormalise. Ties at a threshold are all kept, so
    the result does not depend on the order of equal logits. A row without a finite maximum (NaN,
    all -inf, +inf) comes back as zeros: no distribution.
    """

    def per_row(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (logits.dim() - 1))

    logits = logits if logits.dtype == torch.float64 else logits.float()
    greedy = per_row(temperature) == 0
    scale = torch.where(greedy, 1.0, per_row(temperature)).to(logits.dtype)
    p = torch.softmax(logits / scale, -1)
    if top_k is not None:
        k = torch.where(per_row(top_k) > 0, per_row(top_k), logits.shape[-1]).clamp(
            max=logits.shape[-1]
        )
        kth = p.sort(-1, descending=True).values.gather(-1, (k - 1).expand(*p.shape[:-1], 1))
        p = torch.where(p >= kth, p, 0)
        p = p / p.sum(-1, keepdim=True)
    if top_p is not None:
        ordered = p.sort(-1, descending=True).values
        inside = ordered.cumsum(-1) - ordered < per_row(top_p)  # the smallest set of mass >= top_p
        last = (inside.sum(-1, keepdim=True) - 1).clamp(min=0)
        p = torch.where((p >= ordered.gather(-1, last)) | (per_row(top_p) >= 1), p, 0)
    if min_p is not None:
        p = torch.where(p >= per_row(min_p) * p.max(-1, keepdim=True).values, p, 0)
    if top_p is not None or min_p is not None:
        p = p / p.sum(-1, keepdim=True)
    if bool(greedy.any()):
        one_hot = torch.zeros_like(p).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        p = torch.where(greedy & p[..., :1].isfinite(), one_hot, p)
    return p.nan_to_num_(nan=0.0)  # softmax of a row without a finite maximum is NaN throughout


def race(
    weights: Tensor, seeds: Tensor, step: Tensor, position: Tensor, domain: int, noise: Noise
) -> Tensor:
    """One draw per row from unnormalised weights [B, V]: the largest w/E, E standard exponential.
    -1 where all weights are 0. A few rows at a time, so that the noise stays in a CPU's cache."""
    tokens = torch.arange(weights.shape[-1], device=weights.device)
    winners = []
    for rows in torch.arange(len(weights)).split(max(1, 2**16 // len(tokens))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        bits = noise(seeds[part], step[part], position[part], domain, tokens)
        winners.append((weights[part] / exponential(bits).to(weights.dtype)).argmax(-1))
    return torch.where(weights.sum(-1) > 0, torch.cat(winners), -1)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    position: int,
    noise: Noise,
) -> Tensor:
    """One draft token per row of [B, Vd] logits, as an index into them. A row without a
    distribution gives 0: `verify` sees the same logits and rejects it.
    """
    if not bool((temperature > 0).any()):
        return logits.nan_to_num(nan=-torch.inf).argmax(-1)
    q = probabilities(logits, temperature, top_k, top_p, min_p)
    return race(q, seeds, step, torch.full_like(seeds, position), DRAFT, noise).clamp(min=0)


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    lengths: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    draft_vocab: Tensor | None,
    noise: Noise,
) -> Verdict:
    """Accept a prefix of each row's proposals and draw one token after it.

    Arguments as in `specdistill_kernels.verify`. Greedy rows and sampled rows go their own ways.
    """
    index = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    offered = (index < lengths[:, None]) & (draft_tokens >= 0)
    offered = offered.long().cumprod(-1).bool()

    def pick(value: Tensor | None, rows: Tensor | slice) -> Tensor | None:
        return None if value is None else value[rows]

    def sampled(rows: Tensor | slice) -> Verdict:
        return _verify_sampled(
            draft_tokens[rows],
            pick(draft_logits, rows),
            target_logits[rows],
            offered[rows],
            (temperature[rows], pick(top_k, rows), pick(top_p, rows), pick(min_p, rows)),
            (seeds[rows], step[rows]),
            draft_vocab,
            noise,
        )

    warm = temperature > 0
    if bool(warm.all()):
        return sampled(slice(None))
    verdict = _verify_greedy(draft_tokens, target_logits, offered)
    if bool(warm.any()):
        for whole, part in zip(verdict, sampled(warm), strict=True):
            whole[warm] = part
    return verdict


def _verify_sampled(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    offered: Tensor,
    settings: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    stream: tuple[Tensor, Tensor],
    draft_vocab: Tensor | None,
    noise: Noise,
) -> Verdict:
    """Rows at a temperature above 0. `offered` [B, G] marks the proposals that count, `settings`
    are temperature and filters, `stream` is (seeds, step)."""
    batch, num = draft_tokens.shape
    device = draft_tokens.device
    proposed = draft_tokens.clamp(min=0)
    p = probabilities(target_logits, *settings)  # [B, G+1, V]
    p_x = p[:, :num].gather(-1, proposed[..., None])[..., 0]
    if draft_logits is None:
        q_x = torch.ones_like(p_x)
    else:
        q = probabilities(draft_logits, *settings).to(p.dtype)  # [B, G, Vd]
        column = proposed if draft_vocab is None else torch.searchsorted(draft_vocab, proposed)
        q_x = q.gather(-1, column[..., None])[..., 0]

    # The accept rule: keep x with probability min(1, p(x)/q(x)). The coin stays strictly below, so
    # that a token with p(x) = 0 never passes.
    positions = torch.arange(num, device=device).expand(batch, num)
    seeds, step = (value[:, None].expand(batch, num) for value in stream)
    bits = noise(seeds, step, positions, COIN, torch.zeros(1, dtype=torch.int64, device=device))
    accept = offered & (q_x > 0) & (coin(bits[..., 0]) * q_x.double() < p_x.double())
    num_accepted = accept.long().cumprod(-1).sum(-1)

    # After a rejection the token comes from norm(max(0, p - q)), after full acceptance from p.
    weights = p[torch.arange(batch, device=device), num_accepted]
    rejected = (num_accepted < offered.sum(-1)).nonzero()[:, 0]
    if len(rejected):
        at = num_accepted[rejected]
        residual = weights[rejected]
        if draft_logits is None:
            residual.scatter_(-1, proposed[rejected, at][:, None], 0)
        elif draft_vocab is None:
            residual -= q[rejected, at]
        else:
            residual[:, draft_vocab] -= q[rejected, at]
        residual = residual.clamp_(min=0)
        some = (residual > 0).any(-1, keepdim=True)
        weights[rejected] = torch.where(some, residual, weights[rejected])
    return _assemble(draft_tokens, num_accepted, race(weights, *stream, num_accepted, FINAL, noise))


def _verify_greedy(draft_tokens: Tensor, target_logits: Tensor, offered: Tensor) -> Verdict:
    """All rows at temperature 0: p and q are one-hot, so a proposal stands exactly if it is the
    target's first maximum.
    """
    peak, first = target_logits.max(-1)
    first = torch.where(peak.isfinite(), first, -1)
    accept = offered & (first[:, :-1] == draft_tokens)
    num_accepted = accept.long().cumprod(-1).sum(-1)
    return _assemble(draft_tokens, num_accepted, first.gather(-1, num_accepted[:, None])[:, 0])


def _assemble(draft_tokens: Tensor, num_accepted: Tensor, final: Tensor) -> Verdict:
    index = torch.arange(draft_tokens.shape[1] + 1, device=draft_tokens.device)
    padded = torch.cat([draft_tokens, final[:, None]], -1)
    padded = torch.where(index < num_accepted[:, None], padded, -1)
    return Verdict(padded.scatter(-1, num_accepted[:, None], final[:, None]), num_accepted)
