"""The metrics of a training run, a row a logged step, as RUN/metrics.jsonl has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from specdistill.documents import read_json_lines


class _Row(BaseModel):
    """Numbers by name, and what is measured by position in a list; "loss", "expected_alpha", ..."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | str | list[int | float | None] | None]
    step: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows; a last line that was cut off when the run was killed is none. Raises
    `StorageError`, which names the line that is no row.
    """
    advice = "put the file back as it was, or remove the line"
    return [
        row.model_dump(exclude_unset=True)
        for row in read_json_lines(file, _Row, advice, appended=True)
    ]
