"""A run's folder: the names of its files, its configuration, its metrics, and what a second run in
it must agree with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from specdistill.config import DistillConfig, load_config
from specdistill.documents import read_json_lines
from specdistill.errors import InputError
from specdistill.files import keep_apart, write_whole, writing

_MAY_DIFFER = {"run_dir", "device", "trackers"}  # where it runs, and who watches


class RunFolder:
    """Where the files of a run lie: what `distill` writes, and beside it the scores after and
    before distillation, the pictures and the report.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.trackers = path / "trackers"
        self.draft = path / "draft"
        self.scorecard = path / "scorecard.json"
        self.scorecard_before = path / "scorecard_before.json"
        self.plots = path / "plots"
        self.report = path / "report.md"
        self.report_page = path / "report.html"

    def outputs(self) -> list[Path]:
        """What `distill` writes."""
        old = self.checkpoints.with_suffix(".old")
        return [self.config, self.metrics, self.checkpoints, old, self.samples, self.draft]


def check_run(config: DistillConfig, resume: bool) -> None:
    """Raises `InputError` where the folder holds a run and `resume` is off, or holds one of
    another configuration; the first differing key is named. So it does where the run would write
    over what it reads.
    """
    run = RunFolder(Path(config.run_dir))
    keep_apart(run.outputs(), (config.target, config.draft, config.data))
    if run.metrics.exists() and not resume:
        raise InputError(
            f"{run.path} already holds a run; pass --resume to go on with it, or choose another "
            "run_dir"
        )
    if not resume or not run.config.exists():
        return
    first, now = flat(load_config(run.config).model_dump()), flat(config.model_dump())
    for key in sorted(first.keys() | now.keys()):
        if key not in _MAY_DIFFER and first.get(key) != now.get(key):
            raise InputError(
                f"{run.path} holds a run with {key}: {first.get(key)}, and now it is {now.get(key)}"
                "; resume with the first run's configuration, or choose another run_dir"
            )


def given_config(file: Path, config: DistillConfig, resume: bool) -> None:
    """Raises `InputError` where the run would write over the file that it is told by. What a run
    has written itself may tell it to go on.
    """
    run = RunFolder(Path(config.run_dir))
    if not (resume and run.metrics.exists() and run.config.exists()):
        keep_apart(run.outputs(), [file])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    by_key: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            by_key |= flat(value, f"{prefix}{key}.")
        else:
            by_key[f"{prefix}{key}"] = value
    return by_key


def config_sha256(config: DistillConfig) -> str:
    """Hash of what a run does: all of its configuration but where it runs and who watches."""
    values = {k: v for k, v in flat(config.model_dump()).items() if k not in _MAY_DIFFER}
    return sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


class _MetricsRow(BaseModel):
    """A logged step: numbers by name ("loss", "expected_alpha", ...), and lists of what is measured
    by position.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | str | list[int | float | None] | None]
    step: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl; a last line that was cut off when the run was killed is none.
    Raises `StorageError`, which names the line that is no row.
    """
    advice = "put the file back as it was, or remove the line"
    return [
        row.model_dump(exclude_unset=True)
        for row in read_json_lines(file, _MetricsRow, advice, appended=True)
    ]


def append_metrics(run: RunFolder, row: dict[str, Any]) -> None:
    """Raises `StorageError`."""
    to, advice = f"to {run.metrics}", "free space and resume"
    with writing(to, advice), run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_metrics(run: RunFolder, step: int) -> None:
    """Drop the rows after the checkpoint a run resumes from, and the one that ends a run; they are
    written again.
    """
    file = run.metrics
    rows = read_metrics(file) if step and file.exists() else []
    remaining = [row for row in rows if row.get("step", 0) <= step and "kept_step" not in row]
    with writing(f"to {run.path}", "choose another run_dir"):
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(f"{json.dumps(row)}\n" for row in remaining))


def write_config(config: DistillConfig, facts: Mapping[str, object]) -> None:
    """The resolved configuration, which `specdistill distill` reads again, and in comments what
    else decides a result: its hash, and `facts`.
    """
    facts = {"config_sha256": config_sha256(config), **facts}
    file = RunFolder(Path(config.run_dir)).config
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    text += "".join(f"# {name}: {value}\n" for name, value in facts.items())
    with writing(file, "free space or choose another run_dir"):
        write_whole(file, text)
