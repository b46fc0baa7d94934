"""Drafts that propose a whole round in one pass (PARD, 2504.18583): ordinary language models that
were trained to guess ahead, each place's token from the text and mask tokens in the places between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdistill.decoding.drafters import Context, Draft, ModelDrafter, ModelStream
from specdistill.decoding.rounds import Filters, Proposals, RowState
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.packing import pack
from specdistill.models.parallel import trained_draft_tokens
from specdistill_kernels import RowSettings, sample_places

Way = Literal["auto", "parallel", "autoregressive"]


class ParallelDrafter(ModelDrafter):
    """A draft with a mask token. A round is one pass over what its cache lacks of a text, the last
    token of it, and γ - 1 masks at the positions that follow: the states there give the γ tokens,
    each drawn from its own q, which no other draw of the round changes. The mask token itself is
    never proposed. Raises `InputError` for a draft without one.
    """

    def __init__(
        self, draft: LanguageModel, target_vocab_size: int, *, cuda_graphs: bool = False
    ) -> None:
        super().__init__(draft, target_vocab_size, cuda_graphs=cuda_graphs)
        self.mask_token = mask_token(draft)
        self.mask_column = self._mask_column()

    def open(self, batch: int, capacity: int) -> ParallelStream:
        return ParallelStream(self, batch, capacity, self.graphs())

    def open_captured(self, batch: int, capacity: int) -> ParallelStream:
        return ParallelStream(self, batch, capacity)

    def columns(self, logits: Tensor) -> Tensor:
        """`ModelDrafter.columns`, with the mask token out of reach."""
        logits = ModelDrafter.columns(self, logits)
        if self.mask_column is not None:
            logits[..., self.mask_column].fill_(-math.inf)
        return logits

    def _mask_column(self) -> int | None:
        """The mask token's among those of `columns`, if it has one."""
        ids = torch.arange(self.width) if self.vocab is None else self.vocab
        at = (ids == self.mask_token).nonzero()
        return int(at[0]) if len(at) else None


class ParallelStream(ModelStream):
    """The cache of a parallel draft's model. Masks are not text: the next round writes over their
    slots before it reads them.
    """

    drafter: ParallelDrafter
    most = 0  # tokens of a round, that weights are packed for

    def propose(self, context: Context, num_tokens: int) -> Draft:
        """Rows that lack less than others read some of their text again, which writes the same
        values; with graphs all read as much as after full acceptance, so that rounds have the same
        shape.
        """
        hidden = self.run(context, num_tokens)
        drawn = self._draw(hidden, context.settings)
        return Draft(drawn.tokens, [num_tokens] * len(hidden), *drawn[1:], steps=1)

    def passes(self, num_tokens: int) -> int:
        return 1

    def draft_round(
        self, state: RowState, filters: Filters, num_tokens: int, visible: int
    ) -> Proposals:
        """As `propose`, over so many of a row's last tokens as a round may add."""
        settings, text = state.settings(filters), state.tail[:, -1 - num_tokens :]
        masks = text.new_full((len(text), num_tokens - 1), self.drafter.mask_token)
        places = torch.arange(-num_tokens, num_tokens, device=text.device)
        hidden = self.cached.run(
            torch.cat([self.drafter.readable(text), masks], 1),
            (state.lengths[:, None] + places).clamp(min=0),
            visible,
        )[:, num_tokens:]
        return self._draw(hidden, settings)

    def _draw(self, hidden: Tensor, settings: RowSettings) -> Proposals:
        """By the states [B, G, d] that predict the places of a round."""
        logits = self.drafter.columns(self.cached.logits(hidden))
        tokens, logsumexp = sample_places(logits, settings)
        return Proposals(self.drafter.ids(tokens), logits, logsumexp, self.drafter.vocab)

    def run(self, context: Context, num_tokens: int) -> Tensor:
        """The states [B, G, d] that predict each row's next `num_tokens` tokens."""
        drafter = self.drafter
        self.rewind(context)
        lacking = [len(row) - known for row, known in zip(context.tokens, self.known, strict=True)]
        width = max(*lacking, num_tokens + 1 if drafter.cuda_graphs else 1)
        if num_tokens > self.most:
            self.most = num_tokens
            pack(drafter.draft, 2 * num_tokens * len(lacking))
        text, places = context.tail(width)
        masks = text.new_full((len(text), num_tokens - 1), drafter.mask_token)
        ahead = context.lengths[:, None] + torch.arange(1, num_tokens, device=text.device)
        hidden = self.cached.run(
            torch.cat([drafter.readable(text), masks], 1),
            torch.cat([places, ahead], 1),
            context.longest + num_tokens,
        )
        self.known = [len(row) for row in context.tokens]
        return hidden[:, width - 1 :]


def mask_token(draft: LanguageModel) -> int:
    """Raises `InputError` for a draft without one."""
    if draft.mask_token is None:
        raise InputError(
            f"{draft.name} has no mask token (pard_token in its config.json), so it cannot draft "
            "in parallel; train it with a section `parallel` in the run's configuration, or let it "
            "draft autoregressively"
        )
    return draft.mask_token


def untrained_places(draft: LanguageModel, num_draft_tokens: Sequence[int]) -> str:
    """What to say of a γ above the one that a parallel draft was trained for; empty for none."""
    trained, most = trained_draft_tokens(draft), max(num_draft_tokens)
    if trained is None or most <= trained:
        return ""
    return (
        f"{draft.name} was trained to propose {trained} tokens a round, and γ goes up to {most}: "
        f"what it proposes beyond token {trained} it never learnt, while every token more makes "
        "its pass and the verification wider; acceptance by position in the card shows what it is "
        "worth"
    )


@dataclass(frozen=True)
class Drafting:
    """How a draft model proposes: `way` "auto" is in parallel where it has a mask token.
    `least_reach` is `ModelDrafter`'s.
    """

    way: Way = "auto"
    least_reach: float = 0.0

    def in_parallel(self, draft: LanguageModel) -> bool:
        """Raises `InputError` for a draft that cannot, or a `least_reach` that would do nothing."""
        if self.way == "parallel":
            mask_token(draft)
        parallel = self.way != "autoregressive" and draft.mask_token is not None
        if parallel and self.least_reach:
            raise InputError(
                f"least_reach {self.least_reach:g} ends a proposal early to save draft steps, and "
                f"{draft.name} drafts in parallel: one pass gives all of a round's tokens, and "
                "none is saved; leave it out, or let the draft propose autoregressively"
            )
        return parallel


AUTO = Drafting()


def drafter_for(
    draft: LanguageModel,
    target_vocab_size: int,
    drafting: Drafting = AUTO,
    *,
    cuda_graphs: bool = False,
) -> ModelDrafter:
    """The drafter that a draft model gets. Raises `InputError` where it cannot draft so."""
    if drafting.in_parallel(draft):
        return ParallelDrafter(draft, target_vocab_size, cuda_graphs=cuda_graphs)
    reach = drafting.least_reach
    return ModelDrafter(draft, target_vocab_size, least_reach=reach, cuda_graphs=cuda_graphs)
