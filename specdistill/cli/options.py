"""Options that mean the same in every command that has them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from annotated_types import Interval

from specdistill import limits


def among(allowed: Interval, help: str | None = None) -> Any:
    """An option whose number lies within."""
    return typer.Option(min=allowed.ge, max=allowed.le, help=help)  # type: ignore[arg-type]


Target = Annotated[str, typer.Option(help="Hugging Face id, folder, .gguf file, or demo:smollm2.")]
Draft = Annotated[
    str, typer.Option(help="Draft: as the target, or a folder of `init` or `distill`.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on the last line of stdout.")
]
Dtype = Annotated[limits.Dtype, typer.Option(help="auto: by model and device.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, among(limits.THREADS, "CPU threads; default: all physical cores.")]
Split = Annotated[str | None, typer.Option(help="Split of a `datasets` id.")]
Column = Annotated[str | None, typer.Option(help="Column of a `datasets` id.")]
Prompts = Annotated[
    str, typer.Option(help=".jsonl, .txt, datasets id, demo:train or demo:heldout.")
]
Limit = Annotated[int | None, among(limits.COUNT, "Use only the first so many prompts.")]
LongestAnswer = Annotated[int, among(limits.NEW_TOKENS, "Tokens of the longest answer.")]
BatchSize = Annotated[int, among(limits.ROWS, "Rows decoded together.")]
Seed = Annotated[int, among(limits.SEED)]
