"""Speculative sampling in plain PyTorch, written to be read; every other backend must agree with it
token for token.

Shapes: B requests, G draft positions, V target vocabulary, Vd draft vocabulary (Vd = V unless
`draft_vocab` is given). p is the target's distribution, q the draft's. Sources: Leviathan et al.
2211.17192 (Algorithm 1), Chen et al. 2302.01318; Sun et al. 2403.10444 (block verification); Zhou
et al. 2310.08461 (lenience).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specdistill_kernels.verification.noise import COIN, DRAFT, FINAL, Noise, coin, exponential

Mode = Literal["token", "block"]


class Verdict(NamedTuple):
    tokens: Tensor  # [B, G+1] int64: accepted prefix, one residual or bonus token, then -1
    num_accepted: Tensor  # [B] int64


class RowSettings(NamedTuple):
    """How each of B rows draws its tokens; all [B]. A filter that no row uses may be None."""

    temperature: Tensor  # 0 is greedy
    seeds: Tensor
    step: Tensor  # new in each round of a row
    top_k: Tensor | None = None  # 0 is off
    top_p: Tensor | None = None  # 1 is off
    min_p: Tensor | None = None  # 0 is off

    @property
    def filters(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.top_k, self.top_p, self.min_p

    @property
    def filtered(self) -> bool:
        return any(value is not None for value in self.filters)

    def of(self, rows: Tensor | slice) -> RowSettings:
        """The same of some rows alone."""
        return RowSettings._make(None if value is None else value[rows] for value in self)


class Drawn(NamedTuple):
    tokens: Tensor  # [B] int64, indices into the logits
    logsumexp: Tensor  # [B], of logits / temperature before the filters; 0 in greedy rows


class Lenience(NamedTuple):
    """LOSSY acceptance: keep x with probability min(1, f(p(x)) / q(x)). f(p) is p/ε for "lin", p/ε²
    for "sq" and p**ε for "exp", with 0 < ε <= 1; ε = 1 is the exact rule. From DistillSpec
    (2310.08461).
    """

    kind: Literal["lin", "sq", "exp"]
    epsilon: float

    def __call__(self, p: Tensor) -> Tensor:
        if self.kind == "exp":
            return p**self.epsilon
        return p / self.epsilon ** (2 if self.kind == "sq" else 1)


def probabilities(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """The distribution a token is drawn from: [B, ..., V] raw logits to float32 (float64 stays)
    probabilities.

    Per row, in this order: temperature (0 = one-hot on the first maximum), top-k (0 = off),
    renormalise, top-p (1 = off), min-p (0 = off), renormalise. Ties at a threshold are all kept, so
    the result does not depend on the order of equal logits. `logsumexp` [B, ...], of logits /
    temperature, saves a pass where it is known already. A row without a finite maximum (NaN, all
    -inf, +inf) comes back as zeros: no distribution.
    """

    def per_row(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (logits.dim() - 1))

    logits = logits if logits.dtype == torch.float64 else logits.float()
    greedy = per_row(temperature) == 0
    scale = torch.where(greedy, 1.0, per_row(temperature)).to(logits.dtype)
    if logsumexp is None:
        p = torch.softmax(logits / scale, -1)
    else:
        p = (logits / scale - logsumexp[..., None].to(logits.dtype)).exp_()
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
    batch, width = weights.shape
    tokens = torch.arange(width, device=weights.device)
    size = max(1, 2**16 // width)
    winners = []
    for rows in (slice(start, start + size) for start in range(0, batch, size)):
        bits = noise(seeds[rows], step[rows], position[rows], domain, tokens)
        winners.append((weights[rows] / exponential(bits).to(weights.dtype)).argmax(-1))
    winner = torch.cat(winners)
    return torch.where(weights.gather(-1, winner[:, None])[:, 0] > 0, winner, -1)


def sample(logits: Tensor, rows: RowSettings, *, position: int | Tensor, noise: Noise) -> Drawn:
    """One draft token per row of [B, Vd] logits, at one place of the round or at places [B]. A row
    without a distribution gives token 0: `verify` sees the same logits and rejects it.
    """
    peak, first = logits.max(-1)
    first = torch.where(peak.isfinite(), first, 0)
    peak = peak if logits.dtype == torch.float64 else peak.float()
    warm = rows.temperature > 0
    if not bool(warm.any()):
        return Drawn(first, torch.zeros_like(peak))
    p = probabilities(logits, rows.temperature)
    scaled = peak / torch.where(warm, rows.temperature, 1.0).to(peak.dtype)
    logsumexp = torch.where(warm, scaled - p.amax(-1).log(), 0)
    if rows.filtered:
        p = probabilities(logits, rows.temperature, *rows.filters)
    places = position if isinstance(position, Tensor) else torch.full_like(rows.seeds, position)
    drawn = race(p, rows.seeds, rows.step, places, DRAFT, noise)
    return Drawn(drawn.clamp(min=0), logsumexp)


def sample_places(logits: Tensor, rows: RowSettings, *, noise: Noise) -> Drawn:
    """`sample` at each place of [B, G, Vd] logits, [B, G]: rows and places at once."""
    batch, num = logits.shape[:2]
    places = torch.arange(num, device=logits.device)
    own = torch.arange(batch, device=logits.device).repeat_interleave(num)
    drawn = sample(logits.flatten(0, 1), rows.of(own), position=places.repeat(batch), noise=noise)
    return Drawn(*(part.view(batch, num) for part in drawn))


class Proposals(NamedTuple):
    """Draft tokens [B, G] and what they were drawn from: q [B, G, Vd], whose columns are the target
    ids `vocab` [Vd], or certainty in the rows with `point_mass` [B] (in all of them without q).
    """

    tokens: Tensor
    q: Tensor | None
    vocab: Tensor | None
    point_mass: Tensor | None

    def chances(self) -> Tensor:
        """q of each proposed token, [B, G]."""
        if self.q is None:
            return torch.ones(self.tokens.shape, device=self.tokens.device)
        column = self.tokens
        if self.vocab is not None:
            column = torch.searchsorted(self.vocab, column).clamp(max=len(self.vocab) - 1)
        q_x = self.q.gather(-1, column[..., None])[..., 0]
        return q_x if self.point_mass is None else q_x.where(~self.point_mass[:, None], 1)

    def residual(self, p: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        """max(0, p - q) in place, for weights p [..., V] at positions (rows, at) [...]."""
        certain = None if self.point_mass is None else self.point_mass[rows]
        if self.q is not None:
            q = self.q[rows, at]
            if certain is not None:
                q[certain] = 0
            if self.vocab is None:
                p -= q
            else:
                p[..., self.vocab] -= q
        if self.q is None or certain is not None:
            one = torch.ones(1) if certain is None else certain[..., None]
            x = self.tokens[rows, at][..., None]
            p.scatter_add_(-1, x, -one.to(p).expand(x.shape))
        return p.clamp_(min=0)


def token_rule(p_x: Tensor, q_x: Tensor, coins: Tensor, offered: Tensor) -> Tensor:
    """Keep x with probability min(1, p(x)/q(x)), up to the first rejection; all [B, G]. The coin
    stays strictly below, so that a token with p(x) = 0 never passes. Returns num_accepted [B].
    """
    accept = offered & (q_x > 0) & (coins * q_x.double() < p_x.double())
    return accept.long().cumprod(-1).sum(-1)


def block_rule(
    p: Tensor, p_x: Tensor, proposals: Proposals, coins: Tensor, offered: Tensor
) -> tuple[Tensor, Tensor]:
    """2403.10444, Algorithm 2: the longest prefix whose own coin lies below its h. Returns
    num_accepted [B] and the joint ratio there [B], which scales p in the residual.

    joint_i = min(1, joint_{i-1} p(x_i)/q(x_i)); the whole block stands with h = joint, a shorter
    prefix with h_i = S_i / (S_i + 1 - joint_i), where S_i = Σ max(0, joint_i p - q) one position
    on. Coins beyond the emitted prefix are looked at: the next round must have new ones.
    """
    batch, num = offered.shape
    q_x = proposals.chances().double()
    ratio = (p_x.double() / q_x).where(offered & (q_x > 0), 0)
    joints = [torch.ones(batch, dtype=torch.float64, device=p.device)]
    for i in range(num):
        joints.append((joints[-1] * ratio[:, i]).clamp(max=1))
    joint = torch.stack(joints, 1)  # [B, G+1]

    rows, at = torch.meshgrid(
        torch.arange(batch, device=p.device), torch.arange(1, num, device=p.device), indexing="ij"
    )
    scaled = joint[:, 1:num, None].to(p.dtype) * p[:, 1:num]
    mass = proposals.residual(scaled, rows, at).sum(-1).double()  # S_1 to S_{G-1}
    short = mass / (mass + 1 - joint[:, 1:num])
    short = short.nan_to_num(
        nan=1.0
    )  # p = q and joint = 1: what follows is accepted with certainty
    chance = torch.cat([short, joint[:, num:]], 1)
    index = torch.arange(1, num + 1, device=p.device)
    chance = torch.where(index == offered.sum(-1, keepdim=True), joint[:, 1:], chance)
    num_accepted = (index * (coins < chance)).amax(-1)
    return num_accepted, joint.gather(-1, num_accepted[:, None])[:, 0]


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    rows: RowSettings,
    *,
    lengths: Tensor,
    draft_vocab: Tensor | None,
    draft_lse: Tensor | None,
    point_mass: Tensor | None,
    mode: Mode,
    lenience: Lenience | None,
    noise: Noise,
) -> Verdict:
    """Accept a prefix of each row's proposals and draw one token after it.

    Arguments as in `specdistill_kernels.verify`. Greedy rows and sampled rows go their own ways.
    """
    index = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    offered = (index < lengths[:, None]) & (draft_tokens >= 0)
    offered = offered.long().cumprod(-1).bool()
    if rows.filtered:
        # Rounded otherwise than in `sample`, q could lack a drawn token at a filter's edge.
        draft_lse = None

    def sampled(which: Tensor | slice) -> Verdict:
        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[which]

        own = rows.of(which)
        settings = (own.temperature, *own.filters)
        p = probabilities(target_logits[which], *settings)  # [B, G+1, V]
        q = None
        if draft_logits is not None:
            q = probabilities(draft_logits[which], *settings, pick(draft_lse)).to(p.dtype)
        tokens = draft_tokens[which].clamp(min=0)
        proposals = Proposals(tokens, q, draft_vocab, pick(point_mass))
        return _verify_sampled(p, proposals, offered[which], own, mode, lenience, noise)

    warm = rows.temperature > 0
    if bool(warm.all()):
        return sampled(slice(None))
    verdict = _verify_greedy(draft_tokens, target_logits, offered)
    if bool(warm.any()):
        for whole, part in zip(verdict, sampled(warm), strict=True):
            whole[warm] = part
    return verdict


def _verify_sampled(
    p: Tensor,
    proposals: Proposals,
    offered: Tensor,
    rows: RowSettings,
    mode: Mode,
    lenience: Lenience | None,
    noise: Noise,
) -> Verdict:
    """Rows at a temperature above 0: p [B, G+1, V]; `offered` [B, G] marks the proposals that
    count.
    """
    batch, num = offered.shape
    index = torch.arange(max(batch, num), device=p.device)
    stream = rows.seeds, rows.step
    seeds, step = (value[:, None].expand(batch, num) for value in stream)
    bits = noise(seeds, step, index[:num].expand(batch, num), COIN, index.new_zeros(1))
    coins = coin(bits[..., 0])
    p_x = p[:, :num].gather(-1, proposals.tokens[..., None])[..., 0]
    if mode == "token" or num == 0:
        bar = p_x if lenience is None else lenience(p_x)
        num_accepted = token_rule(bar, proposals.chances(), coins, offered)
        weights = p[index[:batch], num_accepted]
    else:
        num_accepted, joint = block_rule(p, p_x, proposals, coins, offered)
        weights = p[index[:batch], num_accepted] * joint[:, None].to(p.dtype)

    # After a rejection the token comes from norm(max(0, p - q)), after full acceptance from p.
    rejected = (num_accepted < offered.sum(-1)).nonzero()[:, 0]
    if len(rejected):
        residual = proposals.residual(weights[rejected], rejected, num_accepted[rejected])
        some = residual.sum(-1) > 0
        weights[rejected[some]] = residual[some]
    final = race(weights, *stream, num_accepted, FINAL, noise)
    return _assemble(proposals.tokens, num_accepted, final)


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
