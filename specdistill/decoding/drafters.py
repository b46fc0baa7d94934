"""What proposes tokens. A drafter sees the rows' last tokens and lengths, and says which
distribution it drew from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdistill.decoding.cache import CachedModel
from specdistill.decoding.sampling import SamplingBatch
from specdistill.models import LanguageModel
from specdistill_kernels import sample


@dataclass
class RoundState:
    """The batch at the start of a round. `last_two` [B, 2] are each row's last tokens; the target's
    cache holds all tokens but the last, `lengths` [B] of them. `longest` is max(lengths), known on
    the host. `step` [B] counts a row's rounds.
    """

    last_two: Tensor
    lengths: Tensor
    longest: int
    sampling: SamplingBatch
    step: Tensor


@dataclass
class Draft:
    """tokens [B, G] in target ids, and the raw logits [B, G, Vd] they were drawn from under the
    rows' sampling settings. `vocab` [Vd] gives the target ids of the logits where they do not cover
    the target's vocabulary one to one.
    """

    tokens: Tensor
    logits: Tensor | None
    vocab: Tensor | None


class Drafter(Protocol):
    def open(self, batch: int, capacity: int) -> None:
        """Make room for `batch` rows of up to `capacity` tokens."""

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        """New requests in some rows: all their tokens but the last."""

    def propose(self, state: RoundState, num_tokens: int) -> Draft: ...

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, renumbered in this order."""


class ModelDrafter:
    """A small language model of the target's tokenizer, with a cache of its own."""

    def __init__(self, draft: LanguageModel, target_vocab_size: int) -> None:
        self.draft = draft
        self.width = draft.vocab_size
        self.vocab = draft.vocab
        if draft.vocab is None and draft.vocab_size > target_vocab_size:
            self.width = target_vocab_size  # rows that pad the draft's embedding
        elif draft.vocab is None and draft.vocab_size < target_vocab_size:
            self.vocab = torch.arange(
                draft.vocab_size, device=draft.device
            )  # rows that pad the target's

    def readable(self, tokens: Tensor) -> Tensor:
        """Target ids as the draft reads them. An id that only pads the target's embedding may be
        sampled, and the draft may lack it; what it reads instead changes q alone, never the output.
        """
        return tokens.clamp(max=self.draft.full_vocab_size - 1)

    def open(self, batch: int, capacity: int) -> None:
        self.cached = CachedModel(self.draft, batch, capacity)

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        self.cached.prefill(rows, prompts)

    def keep(self, rows: list[int]) -> None:
        self.cached.keep(rows)

    def propose(self, state: RoundState, num_tokens: int) -> Draft:
        """The first pass always takes two tokens: after a fully accepted round the draft has not
        seen the last accepted one yet, and otherwise it writes the same values again. So every
        round has the same shape.
        """
        positions = (
            state.lengths[:, None] + torch.tensor([-1, 0], device=state.lengths.device)
        ).clamp(min=0)
        inputs = torch.where(state.lengths[:, None] > 0, state.last_two, state.last_two[:, 1:])
        inputs = self.readable(inputs)
        tokens, all_logits = [], []
        for i in range(num_tokens):
            hidden = self.cached.run(inputs, positions, state.longest + i + 1)[:, -1]
            logits = self.draft.logits(hidden)[:, : self.width]
            drawn = sample(
                logits,
                **state.sampling.arguments(),
                step=state.step,
                position=i,
            )
            tokens.append(drawn if self.vocab is None else self.vocab[drawn])
            all_logits.append(logits)
            inputs, positions = tokens[-1][:, None], state.lengths[:, None] + i + 1
        return Draft(torch.stack(tokens, 1), torch.stack(all_logits, 1), self.vocab)
