"""docs/commands.md is what typer makes of the command line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "commands.md"


@pytest.mark.skipif(not REFERENCE.exists(), reason="the wheel has no docs")
def test_the_command_reference_is_that_of_the_commands() -> None:
    typer = shutil.which("typer", path=str(Path(sys.executable).parent))
    assert typer, "typer's own command comes with typer"
    asked = ["specdistill.cli.application", "utils", "docs", "--name", "specdistill"]
    made = subprocess.run([typer, *asked], capture_output=True, text=True, check=True).stdout
    assert REFERENCE.read_text(encoding="utf-8") == made, "`make reference` writes it again"
