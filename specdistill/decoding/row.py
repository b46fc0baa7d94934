"""One request under way: its text so far, and what a round makes of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from specdistill.decoding.records import Request, RowRound
from specdistill.errors import DecodingError


@dataclass
class Row:
    request: Request
    tokens: list[int]  # prompt and answer so far; all but the last are in the caches
    emitted: int = 0
    steps: int = 0
    finished: bool = False

    @property
    def left(self) -> int:
        """New tokens that may still come."""
        return self.request.max_new_tokens - self.emitted

    def wanted(self, num_draft_tokens: int) -> int:
        """Proposals that count in its next round."""
        return min(num_draft_tokens, self.left - 1)

    def advance(
        self, tokens: list[int], proposed: int, accepted: int, eos_ids: Collection[int]
    ) -> RowRound:
        """Take a round's tokens, cut at the end of the answer. Raises `DecodingError` where the
        target's logits hold no distribution.
        """
        if tokens[-1] < 0:
            raise DecodingError(
                f"request {self.request.id}, round {self.steps}, new token "
                f"{self.emitted + accepted}: the target's logits are "
                "NaN or all -inf; check the checkpoint, or try dtype float32"
            )
        end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), None)
        tokens = tokens[:end]
        self.tokens += tokens
        self.emitted += len(tokens)
        self.steps += 1
        self.finished = end is not None or self.left <= 0
        tested = min(accepted + 1, proposed, len(tokens))
        return RowRound(
            self.request.id, tokens, proposed, tested, min(accepted, len(tokens)), self.finished
        )
