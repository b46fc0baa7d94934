"""A round as two functions of tensors: a draft's proposals, and the target's pass that verifies
them. The rows they work on lie on the device, and the host reads nothing in between, so that both
can be captured in graphs; on any device they run as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdistill.decoding.cache import CachedModel
from specdistill.decoding.sampling import GREEDY, Sampling, row_settings
from specdistill_kernels import Lenience, Mode, RowSettings, verify

# Of top-k, top-p and min-p, those that some row uses.
Filters = tuple[bool, bool, bool]
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


class RowState(NamedTuple):
    """What the device knows of B rows. A row that is done stays as it is, whatever a round does."""

    tail: Tensor  # [B, W] last tokens, the first again in shorter rows; no cache holds the last
    lengths: Tensor  # [B] tokens before the last one
    left: Tensor  # [B] new tokens that may still come
    done: Tensor  # [B] bool, also of rows without a request
    temperature: Tensor  # [B] as in `RowSettings`, like those that follow
    seeds: Tensor
    step: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def empty(cls, batch: int, device: torch.device, width: int = 2) -> RowState:
        """Rows without requests."""
        none = [0] * batch
        rows = cls.of([[0]] * batch, none, [GREEDY] * batch, none, device, width)
        return rows._replace(done=~rows.done)

    @classmethod
    def of(
        cls,
        texts: list[list[int]],
        left: list[int],
        samplings: list[Sampling],
        seeds: list[int],
        device: torch.device,
        width: int = 2,
    ) -> RowState:
        """New rows that hold these texts, with the last `width` tokens of each."""
        settings = row_settings(samplings, seeds, device)._asdict()
        count = len(texts)
        for name, off in _OFF.items():
            if settings[name] is None:
                kind = torch.int64 if name == "top_k" else torch.float64
                settings[name] = torch.full((count,), off, dtype=kind, device=device)
        return cls(
            torch.tensor(
                [text[:1] * (width - len(text)) + text[-width:] for text in texts], device=device
            ),
            torch.tensor([len(text) - 1 for text in texts], device=device),
            torch.tensor(left, device=device),
            torch.zeros(count, dtype=torch.bool, device=device),
            **settings,
        )

    def first(self, count: int) -> RowState:
        """The first rows, in the same memory."""
        return RowState._make(value[:count] for value in self)

    def write(self, rows: Tensor, other: RowState) -> None:
        """These rows become the others'."""
        for mine, new in zip(self, other, strict=True):
            mine[rows] = new

    def at(self, rows: Tensor) -> RowState:
        """A copy of some rows."""
        return RowState._make(value[rows] for value in self)

    def settings(self, filters: Filters) -> RowSettings:
        chosen = zip(filters, (self.top_k, self.top_p, self.min_p), strict=True)
        used = (value if is_used else None for is_used, value in chosen)
        return RowSettings(self.temperature, self.seeds, self.step, *used)

    def advanced(self, emitted: Tensor, num_accepted: Tensor, eos: Tensor) -> RowState:
        """After a round that emitted these tokens [B, G+1], `num_accepted` [B] and one more of
        each: cut after the first of the tokens `eos` [E]. A row whose target had no distribution is
        done, as is one that ended.
        """
        index = torch.arange(emitted.shape[1], device=emitted.device)
        ends = (emitted[..., None] == eos).any(-1) & (index <= num_accepted[:, None])
        count = torch.where(ends, index + 1, num_accepted[:, None] + 1).amin(-1)
        count = torch.where(self.done, 0, count)
        broken = emitted.gather(1, num_accepted[:, None])[:, 0] < 0
        left = self.left - count
        after = count[:, None] + torch.arange(self.tail.shape[1], device=emitted.device)
        return self._replace(
            tail=torch.cat([self.tail, emitted], 1).gather(1, after).clamp(min=0),
            lengths=self.lengths + count,
            left=left,
            done=self.done | ends.any(-1) | (left <= 0) | broken,
            step=self.step + ~self.done,
        )


class Proposals(NamedTuple):
    """What `Draft` holds, without what the host knows."""

    tokens: Tensor  # [B, G]
    logits: Tensor | None = None  # [B, G, Vd]
    logsumexp: Tensor | None = None  # [B, G]
    vocab: Tensor | None = None  # [Vd]


class Verified(NamedTuple):
    """`report` [B, G+2] is all that the host needs to know: the emitted tokens, -1 after them, and
    how many proposals were accepted; with the proposals [B, G] behind it where they are kept.
    """

    report: Tensor
    hidden: Tensor  # [B, G+1, d] of the target
    logsumexp: Tensor | None  # [B, G+1] of its logits, where states are kept
    state: RowState


def verify_round(
    cached: CachedModel,
    state: RowState,
    filters: Filters,
    draft: Proposals,
    visible: int,
    eos: Tensor,
    *,
    mode: Mode = "token",
    lenience: Lenience | None = None,
    keep_hidden: bool = False,
    keep_proposals: bool = False,
) -> Verified:
    """The target's pass over each row's last token and its proposals, and what comes of it. A row
    that needs only m more tokens has m - 1 proposals that count. `visible` slots are above every
    position.
    """
    num = draft.tokens.shape[1]
    tokens = torch.cat([state.tail[:, -1:], draft.tokens.clamp(min=0)], 1)
    positions = state.lengths[:, None] + torch.arange(num + 1, device=tokens.device)
    hidden = cached.run(tokens, positions, visible)
    logits = cached.logits(hidden)
    verdict = verify(
        draft.tokens,
        draft.logits,
        logits,
        state.settings(filters),
        lengths=(state.left - 1).clamp(min=0, max=num),
        draft_vocab=draft.vocab,
        draft_lse=draft.logsumexp,
        mode=mode,
        lenience=lenience,
    )
    report = [verdict.tokens, verdict.num_accepted[:, None]]
    return Verified(
        torch.cat(report + [draft.tokens] * keep_proposals, 1),
        hidden,
        logits.logsumexp(-1) if keep_hidden else None,
        state.advanced(verdict.tokens, verdict.num_accepted, eos),
    )
