"""A draft leaves: `export`. And what to say in a bug report: `env`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from specdistill.cli import console, tables
from specdistill.cli.options import Json


def export(
    draft: Annotated[str, typer.Option(help="Draft folder.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    engine: Annotated[
        Literal["transformers", "vllm", "sglang", "tensorrt-llm"],
        typer.Option("--for", help="Whose serve command to write."),
    ],
    scorecard: Annotated[
        Path | None,
        typer.Option(help="Card whose figures go along; default: the run's scorecard.json."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Whose number of rows for tokens to take; default: the run's target."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a draft at the target's full vocabulary, as a checkpoint that other engines load, with
    a model card; then load it and compare it with the draft.
    """
    from specdistill.drafts import export as exporting

    console.setup(None)
    done = exporting.export(draft, out, engine, scorecard, target)
    for note in done.notes:
        console.note(note)
    lines = [
        f"{done.out}: {done.vocab_size:,} output tokens. Loaded again, its logits differ from the "
        f"draft's by at most {done.largest_difference:.1e}, and the tokens the draft lacks take "
        f"{done.leaked:.1e} of its probability. Serve it with",
        done.serve,
    ]
    console.print_lines(console.screen_for(as_json), lines)
    console.finish(as_json, asdict(done))


def env(as_json: Json = False) -> None:
    """Versions, devices, threads and what is missing for each optional part, for bug reports."""
    from specdistill.provenance import environment

    facts = environment()
    screen = console.screen_for(as_json)
    screen.print(tables.environment_table(facts))
    console.finish(as_json, asdict(facts))
