"""How long work tells its caller where it is. The command line draws it; a script may ignore it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

Note = Callable[[str], None]  # a line that a user should read


class Progress(Protocol):
    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` units of the named stage; called often, must be cheap."""


def silent(stage: str, done: float, total: float, detail: str = "") -> None:
    """The default: nobody looks."""


def unsaid(line: str) -> None:
    """The default for notes: nobody reads them."""


class Pace:
    """How fast work goes on from its first report: what came before, such as an engine that starts,
    is no part of it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.first: tuple[float, float, float] | None = None

    def words(self, made: float, done: float, total: float) -> str:
        """What is `made` a second, and the time left where `done` of `total` goes on as it went;
        empty where nothing was made since the first report.
        """
        now = self.clock()
        self.first = self.first or (now, made, done)
        seconds, more, advance = (x - y for x, y in zip((now, made, done), self.first, strict=True))
        if seconds <= 0 or more <= 0:
            return ""
        words = f", {more / seconds:,.0f}/s"
        if advance > 0 and done < total:
            left = timedelta(seconds=round(seconds * (total - done) / advance))
            words += f", {left} left"
        return words
