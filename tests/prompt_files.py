"""Messages, files of prompts, and what is said of one that is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from specdistill.data.prompts import load_prompts
from specdistill.errors import InputError


def turn(role: str, text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


user, assistant, system, tool = (
    partial(turn, role) for role in ("user", "assistant", "system", "tool")
)


def write_lines(path: Path, *rows: object) -> str:
    """Write text as it stands and anything else as JSON, one a line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_prompts(source, **options)
    return str(caught.value)
