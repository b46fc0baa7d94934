"""The round loop where rounds are captured: two replays and one copy to the host each. The host
reads a round while the device is at the next one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdistill.decoding.cache import CachedModel
from specdistill.decoding.graphs import Graphs
from specdistill.decoding.records import Round, RowRound
from specdistill.decoding.rounds import Filters, Proposals, RowState, Verified, verify_round
from specdistill.decoding.row import Row
from specdistill.decoding.sampling import row_seed
from specdistill.decoding.watch import Watch
from specdistill.models.packed_linear import Version, version
from specdistill.models.packing import pack

if TYPE_CHECKING:
    from specdistill.decoding.drafters import ModelDrafter
    from specdistill.decoding.engine import SpeculativeDecoder

LEAST_VISIBLE = 128  # slots; more are a power of two, so that few shapes are captured


class Workspace:
    """Rows, caches and graphs of one stream at a time, which a decoder keeps for the next one. A
    stream may take the first `batch` of `width` rows.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        drafter: ModelDrafter | None,
        width: int,
        capacity: int,
    ) -> None:
        target = decoder.target
        self.decoder: SpeculativeDecoder = weakref.proxy(decoder)  # which has this one
        self.device = target.device
        self.batch = self.width = width
        self.models = [target] if drafter is None else [target, drafter.draft]
        self.versions = self._versions()
        self.num = decoder.num_draft_tokens
        pack(target, width * (self.num + 1))
        self.graphs = Graphs(self.device)
        self.cached = CachedModel(target, width, capacity)
        self.drafts = None if drafter is None else drafter.open_captured(width, capacity)
        self.tail = max(2, self.num + 1)  # what a draft's cache may lack of a row
        self.state = RowState.empty(width, self.device, self.tail)
        self.nothing = torch.empty(width, 0, dtype=torch.int64, device=self.device)
        self.eos_ids = target.eos_ids
        self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.int64, device=self.device)
        columns = self.num + 2 + self.num * decoder.keep_proposals
        self.reports = [
            torch.empty(width, columns, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            for _ in range(2)  # one is read while the other is written
        ]

    def serves(self, width: int, capacity: int) -> bool:
        fits = width <= self.width and capacity <= self.cached.capacity
        same = self.eos_ids == self.models[0].eos_ids and self.versions == self._versions()
        return fits and same

    def _versions(self) -> list[Version]:
        """Of the weights: graphs read them where they were."""
        return [version(weight) for m in self.models for weight in m.model.parameters()]

    def reset(self, batch: int) -> None:
        """For another stream of so many rows."""
        self.batch = batch
        empty = RowState.empty(self.width, self.device, self.tail)
        for mine, new in zip(self.state, empty, strict=True):
            mine.copy_(new)
        self.cached.reset(batch)
        if self.drafts is not None:
            self.drafts.reset(batch)

    def admit(self, places: list[int], rows: list[Row]) -> None:
        index = torch.tensor(places, device=self.device)
        prompts = [row.tokens[:-1] for row in rows]
        self.cached.prefill(index, prompts)
        if self.drafts is not None:
            self.drafts.prefill(index, prompts)
        requests = [row.request for row in rows]
        new = RowState.of(
            [row.tokens for row in rows],
            [row.left for row in rows],
            [request.sampling for request in requests],
            [row_seed(request.seed, request.id) for request in requests],
            self.device,
            self.tail,
        )
        self.state.write(index, new)

    def compact(self, rows: list[int]) -> None:
        """Only these rows go on, as the first ones."""
        index = torch.tensor(rows, device=self.device)
        self.state.write(torch.arange(len(rows), device=self.device), self.state.at(index))
        self.cached.compact(rows)
        if self.drafts is not None:
            self.drafts.compact(rows)
        self.batch = len(rows)

    def visible(self, needed: int) -> int:
        """Slots that a round's passes see where `needed` are written."""
        slots = LEAST_VISIBLE
        while slots < needed:
            slots *= 2
        return min(slots, self.cached.capacity)

    def round(
        self, visible: int, filters: Filters, watch: Watch | None = None
    ) -> tuple[Verified, Tensor]:
        """Two replays and one copy to the host, which waits for nothing."""
        draft = self.draft(visible, filters)
        if watch:
            watch.mark("draft")
        verified = self.verify(draft, visible, filters)
        report = self.to_host(verified.report)
        if watch:
            watch.mark("target")
        return verified, report

    def draft(self, visible: int, filters: Filters) -> Proposals:
        """The first replay."""
        drafts, batch = self.drafts, self.batch
        if drafts is None:
            return Proposals(self.nothing[:batch])

        def step() -> Proposals:
            return drafts.draft_round(self.state.first(batch), filters, self.num, visible)

        proposals: Proposals = self.graphs.run(("draft", batch, visible, filters), step)
        return proposals

    def verify(self, draft: Proposals, visible: int, filters: Filters) -> Verified:
        """The second replay, which leaves the rows as they are after the round. `draft` is that of
        the same arguments: its place in memory is captured.
        """
        batch, decoder = self.batch, self.decoder

        def step() -> Verified:
            return verify_round(
                self.cached,
                self.state.first(batch),
                filters,
                draft,
                visible,
                self.eos,
                mode=decoder.mode,
                lenience=decoder.lenience,
                keep_hidden=decoder.keep_hidden,
                keep_proposals=decoder.keep_proposals,
            )

        def commit(verified: Verified) -> None:
            for mine, new in zip(self.state.first(batch), verified.state, strict=True):
                mine.copy_(new)

        verified: Verified = self.graphs.run(
            ("verify", batch, visible, filters), step, commit=commit
        )
        return verified

    def to_host(self, report: Tensor) -> Tensor:
        """Starts a copy. What it returns is whole once the device is there, and is overwritten by
        the copy after the next.
        """
        self.reports.reverse()
        return self.reports[0][: len(report)].copy_(report, non_blocking=True)


@dataclass
class _Launched:
    """A round that the device is at: the rows in it, and where its report will be."""

    rows: list[Row | None]
    report: Tensor
    copied: torch.cuda.Event | None
    hidden: Tensor | None
    logsumexp: Tensor | None
    watch: Watch | None


class CapturedStream:
    """As the eager stream of `engine`, over a workspace."""

    def __init__(self, space: Workspace, rows: Sequence[Row]) -> None:
        self.space, self.decoder = space, space.decoder
        self.num = space.num
        self.eos_ids = space.eos_ids
        self.waiting = deque(rows)
        self.rows: list[Row | None] = [None] * space.batch
        self.filters: Filters = (False, False, False)
        self.watch: Watch | None = None
        self.captures = space.graphs.captures  # that have been told

    def rounds(self) -> Iterator[Round]:
        """Raises `CannotCaptureError`; a round that was not read is then left to be done again."""
        launched: _Launched | None = None
        while True:
            following = self._launch(launched) if self._goes_on(launched) else None
            if launched is not None:
                round_ = self._read(launched)
                if round_.rows:  # else all had ended before it
                    yield round_
            elif following is None:
                return
            launched = following

    def unfinished(self) -> list[Row]:
        """Rows that lack tokens, by what was read of them; those under way first."""
        return [row for row in self.rows if row and not row.finished] + list(self.waiting)

    def _goes_on(self, launched: _Launched | None) -> bool:
        """Whether another round is sure to have work, whatever becomes of the one under way; but a
        row may meet a token that ends it.
        """
        if launched is None:
            return bool(self.waiting) or any(row and not row.finished for row in self.rows)
        most = self.num + 1  # new tokens of a round
        return any(row and not row.finished and row.left > most for row in self.rows)

    def _launch(self, before: _Launched | None) -> _Launched:
        space, decoder = self.space, self.decoder
        watch = Watch(space.device, self.watch) if decoder.timed else None
        admitted = self._admit()
        if watch:
            watch.mark("prefill" if admitted else "other")
        unread = 0 if before is None else self.num + 1  # tokens that a row may be longer by
        longest = max(len(row.tokens) for row in self.rows if row) - 1 + unread
        visible = space.visible(longest + self.num + 1)
        verified, report = space.round(visible, self.filters, watch)
        copied = None
        if space.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(space.device))
        self.watch = watch
        keep = decoder.keep_hidden and verified.logsumexp is not None
        return _Launched(
            list(self.rows),
            report,
            copied,
            verified.hidden.clone() if keep else None,  # the next round overwrites it
            verified.logsumexp.clone() if keep and verified.logsumexp is not None else None,
            watch,
        )

    def _admit(self) -> bool:
        """Fill free rows from the queue; with nobody waiting, halve the batch once half of it is
        free. Returns whether rows came in.
        """
        taken = [i for i, row in enumerate(self.rows) if row and not row.finished]
        free = [i for i, row in enumerate(self.rows) if not row or row.finished]
        if free and self.waiting:
            places = free[: len(self.waiting)]
            new = [self.waiting.popleft() for _ in places]
            for place, row in zip(places, new, strict=True):
                self.rows[place] = row
            self.space.admit(places, new)
            taken += places
        elif len(free) >= len(taken) > 0:
            batch = 1 << (len(taken) - 1).bit_length()
            if batch < len(self.rows):
                rows = taken + free[: batch - len(taken)]
                self.rows = [self.rows[i] for i in rows]
                self.space.compact(rows)
            return False
        else:
            return False
        samplings = [row.request.sampling for row in (self.rows[i] for i in taken) if row]
        self.filters = (
            any(s.top_k for s in samplings),
            any(s.top_p < 1 for s in samplings),
            any(s.min_p for s in samplings),
        )
        return True

    def _read(self, launched: _Launched) -> Round:
        """What the device made of a round, for the rows that had not ended before it."""
        if launched.copied is not None:
            launched.copied.synchronize()
        values, num = launched.report.tolist(), self.num
        rows: list[RowRound] = []
        places: list[int] = []
        for i, row in enumerate(launched.rows):
            if row is None or row.finished:
                continue
            accepted, proposed = values[i][num + 1], row.wanted(num)
            out = row.advance(values[i][: accepted + 1], proposed, accepted, self.eos_ids)
            if self.decoder.keep_proposals:
                out.proposals = values[i][num + 2 :][:proposed]
            rows.append(out)
            places.append(i)
        _give_states(rows, places, launched.hidden, launched.logsumexp)
        steps = 0 if self.space.drafts is None else self.space.drafts.passes(num)
        seconds = {} if launched.watch is None else launched.watch.seconds()
        captures = self.space.graphs.captures - self.captures
        self.captures += captures
        return Round(rows, seconds, steps, captures)


def _give_states(
    rows: list[RowRound], places: list[int], hidden: Tensor | None, logsumexp: Tensor | None
) -> None:
    """Each row its own part of what the target's pass left, by one copy for all."""
    if hidden is None or logsumexp is None or not rows:
        return
    width = hidden.shape[1]
    counts = [len(row.tokens) for row in rows]
    flat = [p * width + i for p, n in zip(places, counts, strict=True) for i in range(n)]
    index = torch.tensor(flat, device=hidden.device)
    states = hidden.flatten(0, 1)[index].split(counts)
    sums = logsumexp.flatten()[index].split(counts)
    for row, own, total in zip(rows, states, sums, strict=True):
        row.hidden, row.logsumexp = own, total
