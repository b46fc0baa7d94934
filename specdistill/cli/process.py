"""What a command's process is given: streams that outlive their readers, and signals that end work
as an interrupt does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from specdistill.quoting import visible


class Lasting:
    """A stream whose loss ends no work: what cannot be encoded is escaped, and what cannot be
    written, as nobody reads any more or there is no room, is dropped. `lost` says why.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, ""
        with suppress(AttributeError, ValueError, OSError):  # not every stream can
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: of a file that is closed
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _lose(self, error: Exception) -> None:
        """What is still in its buffer goes nowhere, so that the last flush does not fail again."""
        self.lost = self.lost or getattr(error, "strerror", None) or str(error)
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


class Plain:
    """A stream to which libraries write, in their warnings say: with names that others gave, whose
    orders to a terminal are escaped. What rich draws goes past it.
    """

    def __init__(self, stream: Lasting) -> None:
        self.rich_proxied_file = stream  # where rich looks

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(visible(text, keep="\n\r\t"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def lasting_streams() -> Iterator[tuple[Lasting, Lasting]]:
    """stdout and stderr that last as long as the command and take no orders to a terminal but
    rich's; where the caller closed one, it goes nowhere.
    """
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        out, err = (
            Lasting(stream or stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            for stream in before
        )
        sys.stdout, sys.stderr = Plain(out), Plain(err)
        try:
            yield out, err
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `KeyboardInterrupt`, so that what is done is saved. A
    signal that the caller ignores (`nohup`) stays ignored.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # which alone may set them
        names = []
    before = {number: signal.getsignal(number) for number in (getattr(signal, n) for n in names)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
