"""The application, and how every command ends."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from specdistill import __version__
from specdistill.cli import (
    console,
    generating,
    quickstart,
    scoring,
    shipping,
    sweeping,
    training,
)
from specdistill.errors import SpecDistillError

COMMANDS = (
    quickstart.quickstart,
    training.init,
    generating.widen,
    generating.generate,
    training.distill,
    sweeping.sweep,
    scoring.score,
    scoring.check,
    scoring.compare,
    scoring.plot,
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
    ("quickstart", "widen", "generate", "sweep"), "; the same command goes on where it stopped"
) | {
    "distill": "; with --resume the same command goes on from the last checkpoint (there is one "
    "every checkpoint_every steps)"
}


def main() -> None:
    """Run a command; our own errors become one line and exit code 2, an interrupt 130. `--debug`
    shows tracebacks.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would run through ours
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments, standalone_mode=True)
    except SpecDistillError as error:
        if debug:
            raise
        console.note(f"error: {error}")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # what typer makes of an interrupt
            raise
        command = next((a for a in arguments if a in _AFTER_INTERRUPT), "")
        console.note(f"interrupted{_AFTER_INTERRUPT.get(command, '')}")
        sys.exit(130)


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
