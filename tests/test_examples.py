"""The examples are valid, and so is every command that they, the README and the reference name."""

import re
from pathlib import Path

import pytest
import typer

from specdistill.cli import app
from specdistill.config import load_config
from specdistill.training.distiller import configured_objective

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
TEXTS = [path for path in (ROOT / "README.md", *EXAMPLES) if path.exists()]

pytestmark = pytest.mark.skipif(not EXAMPLES, reason="the wheel has no examples")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    configured_objective(load_config(path))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_in_the_texts_have_the_options_they_are_given(path: Path) -> None:
    commands = typer.main.get_command(app).commands
    text = re.sub(r"\\\n#?\s*", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"specdistill ([a-z]+)\b(?!\.)([^`|\n]*)", text)
    named = [(name, rest) for name, rest in found if name in commands]
    assert len(named) >= 3
    for name, rest in named:
        known = {option for param in commands[name].params for option in param.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, f"specdistill {name}{rest}"
