"""Files that are there whole or not at all, and folders that one process writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from specdistill.errors import StorageError


def write_whole(file: Path, text: str) -> None:
    """The file holds the old text or the new, whenever the process is killed. Raises `OSError`."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes out that ask for it, too: two that go on with one run
    would each undo the other's work. The system lets go when the process ends, however it does.
    Where it knows no such locks (Windows, some network drives) nobody is kept out; where the folder
    cannot be made, what writes there will say so.

    Raises `StorageError` where another process holds it.
    """
    with ExitStack() as stack:
        try:
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"another process is at work in {folder}; wait for it, or name another folder"
            ) from None
        except (ImportError, OSError):
            pass
        yield
