"""The exceptions users meet. `cli` turns one that reaches it into one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SpecDistillError(Exception):
    """Something the user can put right: the message says what was got, what is allowed and what to
    do.
    """


class InputError(SpecDistillError):
    """A path, prompt file, option or configuration that cannot be used."""


class ModelError(SpecDistillError):
    """A model that cannot be loaded, or a pair that does not fit together."""


class StorageError(SpecDistillError):
    """A file that cannot be written, is truncated, or belongs to other data."""


class DecodingError(SpecDistillError):
    """Decoding met logits or a request it cannot serve; the message names row and step."""


class TrainingError(SpecDistillError):
    """A training run that has come to a loss or a gradient that is no number."""


class ServerError(SpecDistillError):
    """A server that cannot be reached, refuses, or does not speak the protocol."""


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Of a block that calls other libraries, which raise many kinds for what is damaged, impossible
    or missing: raises `ModelError`, which is `what` and the first line of theirs. Ours pass.
    """
    try:
        yield
    except SpecDistillError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What another library said, in one line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
