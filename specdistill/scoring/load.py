"""Several requests at a time, as a server has them: how fast an engine is then, with a draft and
plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from statistics import median, quantiles

from pydantic import with_config

from specdistill.scoring.card_rows import (
    Count,
    Gamma,
    MeasuredPositive,
    Natural,
    Positive,
    Share,
    Strict,
    Temperature,
)


@with_config(Strict)
@dataclass(frozen=True)
class Latency:
    """Seconds over requests: median and 95th percentile; NaN where there was nothing to time."""

    median: MeasuredPositive
    p95: MeasuredPositive

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        if not seconds:
            return cls(float("nan"), float("nan"))
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0])
        return cls(median(seconds), quantiles(seconds, n=20, method="inclusive")[-1])


@with_config(Strict)
@dataclass(frozen=True)
class Plain:
    """Plain decoding at one concurrency. It is measured before and after the drafts, so that
    `tokens_per_second` are several.
    """

    temperature: Temperature
    concurrency: Natural
    tokens_per_second: list[Positive]
    first_token_seconds: Latency
    seconds_per_token: Latency


@with_config(Strict)
@dataclass(frozen=True)
class Drafted:
    """The same requests with the draft. `speedup` is over the mean of plain decoding, NaN where
    there was none; the draft `pays` where it was faster than the fastest plain run.
    `accepted_by_position` is the share of rounds in which the token at each place was accepted.
    """

    temperature: Temperature
    concurrency: Natural
    num_draft_tokens: Gamma
    emitted: Count
    tokens_per_second: Positive
    speedup: MeasuredPositive
    pays: bool
    first_token_seconds: Latency
    seconds_per_token: Latency
    accepted_by_position: list[Share]


@with_config(Strict)
@dataclass(frozen=True)
class Load:
    plain: list[Plain] = field(default_factory=list)
    drafted: list[Drafted] = field(default_factory=list)

    def best(self, temperature: float) -> dict[int, Drafted]:
        """By concurrency the fastest γ."""
        fastest: dict[int, Drafted] = {}
        for row in self.drafted:
            known = fastest.get(row.concurrency)
            if row.temperature == temperature and (not known or row.speedup > known.speedup):
                fastest[row.concurrency] = row
        return dict(sorted(fastest.items()))

    def schedule(self, temperature: float, only: int | None = None) -> list[list[int]]:
        """The fastest γ by the number of requests under way, as ranges [first, last, γ] from each
        measured concurrency to the next, the first from 1; 0 where the draft does not pay. Empty
        where one γ is the fastest in all, or none pays. With `only` that γ or none.
        """
        rows = [row for row in self.drafted if only in (None, row.num_draft_tokens)]
        best = Load(drafted=rows).best(temperature)
        ranges: list[list[int]] = []
        for concurrency, row in best.items():
            num = row.num_draft_tokens if row.pays else 0
            if ranges:
                ranges[-1][1] = concurrency - 1
            if ranges and ranges[-1][2] == num:
                ranges[-1][1] = concurrency
            else:
                ranges.append([concurrency if ranges else 1, concurrency, num])
        return ranges if len(ranges) > 1 else []

    @property
    def lines(self) -> list[str]:
        """Up to which concurrency the draft pays, a sentence for each temperature; none where plain
        decoding, or a draft, was not measured.
        """
        temperatures = dict.fromkeys(row.temperature for row in self.plain)
        return [_line(t, best) for t in temperatures if (best := self.best(t))]


def _line(temperature: float, best: Mapping[int, Drafted]) -> str:
    paying = list(takewhile(lambda concurrency: best[concurrency].pays, best))
    if not paying:
        judged = f"the draft does not pay at {min(best)} at a time"
    elif len(paying) == len(best):
        judged = f"the draft pays up to {paying[-1]} at a time, the most that was measured"
    else:
        judged = (
            f"the draft pays up to {paying[-1]} at a time, and not at {list(best)[len(paying)]}"
        )
    each = ", ".join(
        f"{concurrency}: {row.speedup:.2f} times plain at γ = {row.num_draft_tokens}"
        for concurrency, row in best.items()
    )
    return f"At temperature {temperature:g} {judged} ({each})."


@dataclass(frozen=True)
class Run:
    """What an engine said of one run: seconds from the run's start, per request the number of its
    tokens and the seconds from being handed over to the first and the last of them.
    """

    seconds: float
    tokens: list[int]
    first: list[float]
    last: list[float]
    accepted_by_position: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return sum(self.tokens) / self.seconds

    @property
    def first_token(self) -> Latency:
        return Latency.of(self.first)

    @property
    def per_token(self) -> Latency:
        """Of the tokens after the first."""
        each = zip(self.tokens, self.first, self.last, strict=True)
        return Latency.of([(last - first) / (n - 1) for n, first, last in each if n > 1])


def load_rows(
    temperature: float, concurrency: int, plain: Sequence[Run], drafted: Mapping[int, Run]
) -> tuple[Plain, list[Drafted]]:
    """The rows of one concurrency, from runs by γ."""
    rates = [run.rate for run in plain]
    every = Run(
        sum(run.seconds for run in plain),
        *([x for run in plain for x in getattr(run, name)] for name in ("tokens", "first", "last")),
    )
    rows = [
        replace(
            without_plain(temperature, concurrency, num, run),
            speedup=run.rate / every.rate,
            pays=run.rate > max(rates),
        )
        for num, run in drafted.items()
    ]
    return Plain(temperature, concurrency, rates, every.first_token, every.per_token), rows


def without_plain(temperature: float, concurrency: int, num: int, run: Run) -> Drafted:
    """The row of a run that no plain one can be set against."""
    return Drafted(
        temperature,
        concurrency,
        num,
        sum(run.tokens),
        run.rate,
        math.nan,
        False,
        run.first_token,
        run.per_token,
        run.accepted_by_position,
    )
