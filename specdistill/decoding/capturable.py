"""What a drafter offers whose rounds can be captured as a whole."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from specdistill.decoding.drafters import Drafter, DraftStream
from specdistill.decoding.rounds import Filters, Proposals, RowState


class CapturableStream(DraftStream, Protocol):
    """Proposes from what the device knows of the rows, by a function of tensors that is captured:
    nothing in it may depend on a tensor's values.
    """

    def draft_round(
        self, state: RowState, filters: Filters, num_tokens: int, visible: int
    ) -> Proposals:
        """`num_tokens` proposals a row; `visible` slots are above every position."""
        ...

    def passes(self, num_tokens: int) -> int:
        """Passes of a draft model that a round takes."""
        ...

    def compact(self, rows: list[int]) -> None:
        """As `keep`, in the same memory."""

    def reset(self, batch: int) -> None:
        """So many rows of those there were at first, for new requests."""


@runtime_checkable
class CapturableDrafter(Drafter, Protocol):
    @property
    def hindrance(self) -> str:
        """Why its rounds cannot be captured; empty if they can."""
        ...

    def open_captured(self, batch: int, capacity: int) -> CapturableStream: ...
