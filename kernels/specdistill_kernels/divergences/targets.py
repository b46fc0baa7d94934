"""The two sides of a distillation loss as the caller has them, and how they are cut into the rows a
kernel takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdistill_kernels.divergences.reference import Dense, Lumped, Mixture, wide

Rows = slice | Tensor


@dataclass(frozen=True)
class Head:
    """A language model's last layer: z = scale · (hidden weightᵀ + bias), then c · tanh(z / c)
    where there is a softcap c (Gemma 2).

    weight: [V, d]; bias: [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] to [n, V]."""
        out = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            out = out * self.scale
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """Derivative of the logits with respect to hidden weightᵀ + bias; None if it is 1."""
        if self.softcap is not None:
            return self.scale * (1 - (logits / self.softcap) ** 2)
        return None if self.scale == 1 else self.scale

    def of(self, tokens: Tensor) -> Head:
        """The same head for these tokens alone."""
        bias = None if self.bias is None else self.bias[tokens]
        return replace(self, weight=self.weight[tokens], bias=bias)


class TargetStates(NamedTuple):
    """The target as its final hidden states [N, d], after the last norm, live or kept, and its
    head. Exact.

    logsumexp: [N], if it was kept, of all logits / `temperature`. With it, a draft whose vocabulary
    is trimmed costs the head's rows of its own tokens only; without trimming it is not read. Those
    rows are gathered on every call, unless the head is `cut` to them: `head.of(draft_vocab)`.
    """

    hidden: Tensor
    head: Head
    logsumexp: Tensor | None = None
    temperature: float = 1.0
    cut: bool = False


class TargetTopK(NamedTuple):
    """The target as its k most probable tokens at `temperature` and the mass of all others.

    tokens: [N, k] distinct target ids; log_probs: [N, k]; log_tail: [N], the log of the mass
    outside. The tail is one lumped outcome: p gives it that mass, q the sum over the draft's tokens
    outside the k. Lumping cannot raise a divergence: all but lk_hybrid come out at or below their
    exact values (the acceptance rate at or above), lk_hybrid too for the same share, ce is exact.
    Where the draft's vocabulary is trimmed, the whole tail counts as kept, and for fkl, jeffreys
    and lk_hybrid this is no bound any more.
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor
    temperature: float = 1.0


Target = Tensor | TargetStates | TargetTopK


def keep_top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TargetTopK:
    """`TargetTopK` of raw [N, V] logits. The tail is summed, not one minus the rest, so that it
    stays right where it is tiny.
    """
    log_p = torch.log_softmax(wide(logits.detach()) / temperature, -1)
    top = log_p.topk(k, -1)
    rest = log_p.scatter(-1, top.indices, -torch.inf)
    return TargetTopK(top.indices, top.values, rest.logsumexp(-1), temperature)


def draft_columns(tokens: Tensor, width: int, draft_vocab: Tensor | None = None) -> Tensor:
    """Target ids to columns of the draft's logits, -1 where the draft lacks the token and for
    negative ids. draft_vocab: [width] target id of each column, in any order.
    """
    if draft_vocab is None:
        return torch.where((tokens >= 0) & (tokens < width), tokens, -1)
    ordered, order = draft_vocab.sort()
    place = torch.searchsorted(ordered, tokens.contiguous()).clamp(max=width - 1)
    return torch.where(ordered[place] == tokens, order[place], -1)


class RowKernel(Protocol):
    """What a backend computes of one chunk. `reference` is the one in torch, and says what; a
    kernel may overwrite the logits, and write the gradient there.
    """

    def logsumexp(self, logits: Tensor, temperature: float) -> Tensor: ...

    def row_losses(
        self,
        draft_logits: Tensor,
        target: Dense | Lumped | None,
        labels: Tensor | None,
        parts: Mixture,
        temperature: float,
    ) -> Tensor: ...

    def row_gradients(
        self,
        draft_logits: Tensor,
        target: Dense | Lumped | None,
        labels: Tensor | None,
        weights: Tensor,
        parts: Mixture,
        temperature: float,
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Case:
    """What was asked for, checked by `prepare`. `rows` hands a kernel its part of it."""

    target: Target | None  # TargetTopK: its tokens are columns of the draft's logits here
    labels: Tensor | None  # [N], columns too
    parts: Mixture
    temperature: float
    draft_vocab: Tensor | None
    cut: bool  # the target's head holds the rows of draft_vocab only
    kernel: RowKernel

    def losses(self, draft_logits: Tensor, rows: Rows) -> Tensor:
        """[n] of the rows with these raw draft logits [n, Vd]."""
        logits = wide(draft_logits)
        return self.kernel.row_losses(logits, *self.rows(rows), self.parts, self.temperature)

    @torch.no_grad()
    def rows(self, rows: Rows) -> tuple[Dense | Lumped | None, Tensor | None]:
        return self._target(rows), None if self.labels is None else self.labels[rows]

    def _target(self, rows: Rows) -> Dense | Lumped | None:
        target = self.target
        if target is None:
            return None
        if isinstance(target, TargetTopK):
            return Lumped(target.tokens[rows], target.log_probs[rows], target.log_tail[rows])
        if isinstance(target, Tensor):
            logits = target[rows]
        else:
            logits = target.head.logits(target.hidden[rows])
            if self.cut and target.logsumexp is not None:
                return Dense(logits, target.logsumexp[rows])
        if self.draft_vocab is None:
            return Dense(logits, None)
        whole = self.kernel.logsumexp(logits, self.temperature)
        return Dense(logits.index_select(-1, self.draft_vocab), whole)


def prepare(
    num: int,
    width: int,
    target: Target | None,
    labels: Tensor | None,
    parts: Mixture,
    temperature: float,
    draft_vocab: Tensor | None,
    kernel: RowKernel,
) -> Case:
    """num: N rows; width: Vd draft logits. Raises ValueError for what does not fit."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if draft_vocab is not None and draft_vocab.shape != (width,):
        raise ValueError(
            f"draft_vocab must be [{width}], the target id of each draft logit; "
            f"got {list(draft_vocab.shape)}"
        )
    if "ce" not in parts.weights:
        labels = None
    elif labels is None or labels.shape != (num,):
        got = "none" if labels is None else list(labels.shape)
        raise ValueError(f"labels must be [{num}] target ids for the loss 'ce'; got {got}")
    else:
        labels = draft_columns(labels, width, draft_vocab)
    cut = False
    if set(parts.weights) == {"ce"}:
        target = None
    elif target is None:
        raise ValueError("only the loss 'ce' does without a target; say what the target says")
    else:
        _check(target, num, width, temperature, draft_vocab)
        if isinstance(target, TargetTopK):
            target = target._replace(tokens=draft_columns(target.tokens, width, draft_vocab))
        elif isinstance(target, TargetStates) and draft_vocab is not None:
            cut = target.logsumexp is not None
            if cut and not target.cut:
                target = target._replace(head=target.head.of(draft_vocab))
    return Case(target, labels, parts, temperature, draft_vocab, cut, kernel)


def _check(
    target: Target, num: int, width: int, temperature: float, draft_vocab: Tensor | None
) -> None:
    kept_at, tokens = temperature, width
    if isinstance(target, TargetTopK):
        rows, kept_at = len(target.tokens), target.temperature
    elif isinstance(target, TargetStates):
        rows, tokens = len(target.hidden), len(target.head.weight)
        if target.logsumexp is not None:
            kept_at = target.temperature
        if target.cut and (draft_vocab is None or target.logsumexp is None or tokens != width):
            raise ValueError(
                f"the target's head is cut, to {tokens} tokens: give draft_vocab, those {width} of "
                "the draft, and the logsumexp over all the target's"
            )
    else:
        rows, tokens = target.shape
    if rows != num:
        raise ValueError(f"the draft has {num} rows and the target {rows}; they must be the same")
    if draft_vocab is None and tokens != width:
        raise ValueError(
            f"the draft has {width} tokens and the target {tokens}: give draft_vocab, the target "
            "id of each draft logit, or cut both heads to the tokens they share"
        )
    if kept_at != temperature:
        raise ValueError(
            f"what was kept of the target belongs to temperature {kept_at} and the loss asks for "
            f"{temperature}: leave logsumexp out, or keep it at that temperature"
        )
