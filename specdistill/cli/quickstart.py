"""The whole loop in one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from specdistill.cli import console, tables
from specdistill.cli.options import Json, Threads
from specdistill.files import held


def quickstart(
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: a new one under runs/.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole loop on the embedded model: answers, draft, distillation, score, report; exit code
    1 if decoding is not lossless.
    """
    from specdistill import quickstart as loop
    from specdistill.scoring.measure import trained_line

    console.setup(threads)
    folder = run_dir or _new_run(Path("runs"))
    known = "going on with" if folder.exists() else "about eight minutes on two quiet cores, in"
    console.note(f"{known} {folder}")
    start = time.perf_counter()
    with held(folder), console.progress() as progress:
        before, after = loop.quickstart(folder, progress=progress, note=console.note)
    out = console.screen_for(as_json)
    out.print(tables.before_after_table(before, after))
    lines = [tables.evidence_line(after), after.verdict.reason, trained_line(after)]
    console.print_lines(out, [line for line in lines if line])
    out.print(
        f"Report: {folder / 'report.html'}, report.md   draft: {folder / 'draft'}   pictures: "
        f"{folder / 'plots'}",
        soft_wrap=True,
    )
    out.print(f"{time.perf_counter() - start:.0f} s in all")
    console.finish(
        as_json, {"run_dir": str(folder), "before": before.document(), "after": after.document()}
    )
    if before.failures or after.failures:
        raise typer.Exit(1)


def _new_run(parent: Path) -> Path:
    """runs/quickstart, or the first quickstart-2, -3, ... that holds no finished run; an unfinished
    one is continued.
    """
    number = 1
    while (folder := parent / ("quickstart" if number == 1 else f"quickstart-{number}")) and (
        folder / "report.md"
    ).exists():
        number += 1
    return folder
