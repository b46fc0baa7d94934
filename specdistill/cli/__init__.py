"""The command line: the only package that prints or exits. Heavy imports wait for the commands."""

from specdistill.cli.application import app, main

__all__ = ["app", "main"]
