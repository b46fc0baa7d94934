"""Files that are there whole or not at all, and folders that one process writes."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from safetensors import SafetensorError

from specdistill.errors import InputError, StorageError

P = ParamSpec("P")
R = TypeVar("R")
AGAIN = "free space and run again to go on"  # advice for work that is continued
UNFINISHED = ".unfinished-"  # how the name begins of what a killed process may leave

_held: dict[Path, int] = {}  # how often this process has taken each


def at_home(path: str) -> str:
    """A path that begins with `~`, or such a value of `key=`, with the folder that stands for; the
    shell sees only what is a word of its own.
    """
    key, equals, value = path.partition("=")
    if equals and value.startswith("~"):
        return f"{key}={os.path.expanduser(value)}"
    return os.path.expanduser(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write the file or folder that is to stand at `path`; it gets there when the block
    ends, and is removed where that ends in an error. It lies beside `path`, in a folder that is
    nobody else's and has a name that nobody can guess. A link at `path` is replaced, not followed.
    A folder that is not empty cannot be exchanged in one step: for a moment there is none.

    Raises `OSError`.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=UNFINISHED, dir=path.parent, ignore_cleanup_errors=True
    ) as private:
        new, old = Path(private, path.name), Path(private, "old", path.name)
        yield new
        if new.is_dir() and (path.is_symlink() or (path.is_dir() and any(path.iterdir()))):
            old.parent.mkdir()
            path.rename(old)
            try:
                new.rename(path)
            except OSError:
                old.rename(path)
                raise
        else:
            new.replace(path)


@contextmanager
def writing(what: object, advice: str) -> Iterator[None]:
    """Of a block that writes `what`, such as a file or "the draft to" a folder: raises
    `StorageError`, which says why that cannot be written, and the advice.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {what}: {reason}; {advice}") from error


def write_whole(file: Path, text: str) -> None:
    """The file holds the old text or the new, whenever the process is killed. Raises `OSError`."""
    with replacing(file) as new:
        new.write_text(text, encoding="utf-8")


def keep_apart(written: Iterable[Path], read: Iterable[Path | str | None]) -> None:
    """What is read is not written over: asked before any work. Links and `..` are followed, and
    what is not here, as an id of a hub, cannot be lost. Raises `InputError`.
    """
    places = {out: Path(os.path.realpath(out)) for out in written}
    for source in read:
        if source is None or not os.path.exists(os.path.expanduser(source)):
            continue
        origin = Path(os.path.realpath(os.path.expanduser(source)))
        for out, place in places.items():
            replaced = origin in place.parents and os.path.lexists(place)
            if place == origin or place in origin.parents or replaced:
                raise InputError(
                    f"{out} would be written over {source}, which is read; name another place"
                )


def must_be_new(folder: Path) -> None:
    """Asked before long work. Raises `InputError` for a file, or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name another folder or remove it")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes out that ask for it, too: two that go on with one run
    would each undo the other's work. Who holds it may ask again. The system lets go when the
    process ends, however it does. A folder that was made for this and is empty in the end goes.
    Where the system knows no such locks (Windows, some network drives) nobody is kept out.

    Raises `StorageError` where another process holds it, or it cannot be made.
    """
    place = Path(os.path.realpath(folder))
    with ExitStack() as stack:
        if not _held.get(place):
            try:
                _lock(place, stack)
            except BlockingIOError:
                raise StorageError(
                    f"another process is at work in {folder}; wait for it, or name another folder"
                ) from None
            except (ImportError, OSError) as error:
                if isinstance(error, OSError) and not folder.is_dir():
                    raise StorageError(
                        f"cannot write to {folder}: {error.strerror}; choose another folder"
                    ) from error
        _held[place] = _held.get(place, 0) + 1
        try:
            yield
        finally:
            _held[place] -= 1


def holding(parameter: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a function that is alone at work in the folder that is its `parameter`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> R:
            place = signature.bind(*args, **kwargs).arguments[parameter]
            with held(Path(place)):
                return function(*args, **kwargs)

        return alone

    return decorate


def lock_of(file: Path) -> Path:
    """What to hold while a single file is written, in steps or after long work."""
    return file.with_name(f".{file.name}.lock")


def _lock(folder: Path, stack: ExitStack) -> None:
    import fcntl

    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            made = False
        else:
            made = True
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(handle), os.stat(folder))
        except FileNotFoundError:
            current = False
        except OSError:
            os.close(handle)
            raise
        if current:
            break
        os.close(handle)  # who held it has put another in its place, or removed it
    stack.callback(os.close, handle)
    if made:
        stack.callback(_remove_empty, folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
