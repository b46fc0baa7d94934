"""How long work tells its caller where it is. The command line draws it; a script may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Note = Callable[[str], None]  # a line that a user should read


class Progress(Protocol):
    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` units of the named stage; called often, must be cheap."""


def silent(stage: str, done: float, total: float, detail: str = "") -> None:
    """The default: nobody looks."""


def unsaid(line: str) -> None:
    """The default for notes: nobody reads them."""
