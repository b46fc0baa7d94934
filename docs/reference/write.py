"""Write the generated pages beside this file: commands.md from the command line, config.md from the
models that read a run's YAML file. `make reference` runs it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from specdistill.config import POLICY_SETTINGS, DistillConfig
from specdistill.sweep import Score

HERE = Path(__file__).parent
INTRODUCTION = """\
# Configuration

The keys of the YAML file that `specdistill distill` and `specdistill sweep` read. An unknown key
is an error. Any key can be overridden on the command line, for instance
`specdistill distill config.yaml training.max_steps=500`.
[Training](../guide/training.md) explains losses, policies and larger runs.

`make reference` writes this page from `specdistill/config/`."""
UNBOUNDED = 10**9  # a larger maximum only stops slips of the pen


def commands() -> str:
    """Every option of every command, as typer describes them."""
    typer = shutil.which("typer", path=str(Path(sys.executable).parent))
    assert typer, "typer's own command comes with typer"
    asked = [typer, "specdistill.cli.application", "utils", "docs", "--name", "specdistill"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def configuration() -> str:
    """Every key of every section: what it may be, its default, what it means."""
    schema = DistillConfig.model_json_schema()
    sections = [("A run", schema)]
    for name in ("training", "lora", "parallel", "policy", "decode", "hints", "reward"):
        model = schema["$defs"][name.title()]
        sections.append((f"training.{name}" if name == "lora" else name, model))
    sections.append(("score (of a sweep)", Score.model_json_schema()))
    parts = [INTRODUCTION]
    for title, model in sections:
        parts += [f"\n## {title}\n", _prose(model["description"]), "", *_table(model)]
        if title == "policy":
            parts += ["", *_policies()]
    return "\n".join(parts) + "\n"


def _table(model: dict[str, Any]) -> list[str]:
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, field in model["properties"].items():
        default = "required" if key in model.get("required", []) else _default(field)
        meaning = _prose(field.get("description", ""))
        cells = (f"`{key}`", _allowed(field), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _policies() -> list[str]:
    lines = ["| policy | its settings and their defaults |", "|---|---|"]
    for name, settings in POLICY_SETTINGS.items():
        cell = ", ".join(f"`{key}: {value:g}`" for key, value in settings.items())
        lines.append(f"| `{name}` | {cell or 'none'} |")
    return lines


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if "$ref" in field or (isinstance(value, dict) and "anyOf" in field):
        return "see below"
    return f"`{json.dumps(value)}`"


def _allowed(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_allowed(choice) for choice in field["anyOf"])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2].lower()
        return f"[a section](#{'traininglora' if name == 'lora' else name})"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    match field["type"]:
        case "boolean":
            return "`true`, `false`"
        case "array":
            return f"list of: {_allowed(field['items'])}"
        case "object" if field["additionalProperties"] is True:
            return "mapping"
        case "object":
            return f"mapping, of: {_allowed(field['additionalProperties'])}"
        case "integer" | "number" as kind:
            return kind + _bounds(field)
        case kind:
            return "text" if kind == "string" else kind


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maximum": "≤"}
    if "exclusiveMaximum" in field:
        del signs["maximum"]
    bounds = [
        f"{sign} {field[name]:,}".removesuffix(".0")
        for name, sign in signs.items()
        if name in field and not (name == "maximum" and field[name] >= UNBOUNDED)
    ]
    return " " + ", ".join(bounds) if bounds else ""


def _prose(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    (HERE / "commands.md").write_text(commands(), encoding="utf-8")
    (HERE / "config.md").write_text(configuration(), encoding="utf-8")
