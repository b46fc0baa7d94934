"""How long work tells its caller where it is. The command line draws it; a script may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def __call__(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """`done` of `total` units of the named stage; called often, must be cheap."""


def silent(stage: str, done: float, total: float, detail: str = "") -> None:
    """The default: nobody looks."""
