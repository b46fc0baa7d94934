"""The application, and how every command ends."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from itertools import pairwise
from typing import Annotated

import typer

from specdistill import __version__
from specdistill.cli import (
    asking,
    comparing,
    console,
    generating,
    quickstart,
    scoring,
    shipping,
    sweeping,
    training,
)
from specdistill.cli.process import interrupting_signals, lasting_streams
from specdistill.errors import InputError, SpecDistillError
from specdistill.files import at_home

_OF_THE_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EFBIG,
}
# How libraries whose errors are no `OSError` say it.
_FULL = ("No space left on device", "PytorchStreamWriter failed")
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
COMMANDS = (
    quickstart.quickstart,
    training.init,
    generating.widen,
    generating.generate,
    asking.ask,
    training.distill,
    sweeping.sweep,
    scoring.score,
    comparing.check,
    comparing.compare,
    comparing.plot,
    shipping.export,
    shipping.env,
)
app = typer.Typer(
    name="specdistill",
    help="Make a draft model for your target and your prompts, distil it, and score it by real "
    "speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)

_AFTER_INTERRUPT = dict.fromkeys(
    ("quickstart", "widen", "generate", "ask", "sweep"),
    "; the same command goes on where it stopped",
) | {
    "distill": "; with --resume the same command goes on from the last checkpoint (there is one "
    "every checkpoint_every steps)"
}


def main() -> None:
    """Run a command; our own errors become one line and exit code 2, an interrupt 130, and what
    nobody foresaw 70. `--debug` shows tracebacks.
    """
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")  # the libraries' bars would run through ours
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    with lasting_streams() as (out, _), interrupting_signals():
        try:
            _run(arguments, debug)
        finally:
            out.flush()
            if out.lost:
                console.note(f"what was printed is lost: {out.lost}; results are in their files")


def _run(arguments: list[str], debug: bool) -> None:
    try:
        _refuse_empty(arguments)
        _refuse_servers(arguments)
        app([at_home(argument) for argument in arguments], standalone_mode=True)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # what typer makes of an interrupt
            raise
        command = next((a for a in arguments if a in _AFTER_INTERRUPT), "")
        console.note(f"interrupted{_AFTER_INTERRUPT.get(command, '')}")
        sys.exit(130)
    except Exception as error:
        if debug:
            console.note(traceback.format_exc().rstrip())
        line, code = _last_words(error)
        console.note(f"error: {line}")
        sys.exit(code)


def _refuse_empty(arguments: list[str]) -> None:
    """An empty text names no model, file or setting, and as a folder it would be the working
    directory. Raises `InputError`.
    """
    for before, argument in pairwise(["", *arguments]):
        option, equals, value = argument.partition("=")
        if not argument or (option.startswith("--") and equals and not value):
            name = option or before or "an argument"
            raise InputError(f"{name}: the value is empty; give it one, or leave it out")


def _refuse_servers(arguments: list[str]) -> None:
    """`generate` asked servers, too, before there was `ask`. Raises `InputError`."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if words[:1] == ["generate"] and ("--engine", "openai") in pairwise(words):
        raise InputError(
            "`generate` asks no server; type `specdistill ask --base-url URL --target MODEL "
            "--prompts P --out FOLDER`, without --engine"
        )


def _last_words(error: Exception) -> tuple[str, int]:
    """The line and the exit code that an error ends with: 2 where the user can put it right."""
    if isinstance(error, SpecDistillError):
        return str(error), 2
    reason = " ".join(str(error).split()) or type(error).__name__
    # By name, as importing torch for its error would take seconds.
    kind, code = type(error).__name__, 2
    out_of_memory = isinstance(error, MemoryError) or kind == "OutOfMemoryError"
    if out_of_memory or any(words in reason for words in _OUT_OF_MEMORY):
        line = (
            f"the memory does not suffice ({reason[:200]}); take fewer rows at once (--batch-size, "
            "training.batch_tokens), shorter texts, a lower dtype or a smaller model"
        )
    elif isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        line = f"{error.filename or 'a file'}: {error.strerror}; make room, or name another place"
    elif any(words in reason for words in _FULL):
        line = f"a file cannot be written ({reason[:200]}); make room, or name another place"
    else:
        code = 70
        line = (
            f"{kind}: {reason[:500]}; this is a fault of SpecDistill itself: run with --debug to "
            "see where, and report it"
        )
    return line, code


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""
