"""Many runs at once: `sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from specdistill.cli import console, tables
from specdistill.cli.options import Json, Threads


def sweep(
    config: Annotated[
        Path, typer.Argument(help="YAML file of `distill`, with the sections grid and score.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, section.key=value ...")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Distil and score a grid of runs, then compare them; exit code 1 if one of them failed."""
    console.setup(threads)
    from specdistill import sweep as sweeping
    from specdistill.scoring.compare import Comparison

    plan = sweeping.load_sweep(config, overrides or [])
    number = len(plan.configs)
    console.note(f"{number} run{'s' * (number > 1)} in {plan.folder}")
    with console.progress() as progress:
        result = sweeping.run_sweep(plan, progress, console.note)
    screen = console.screen_for(as_json)
    screen.print(tables.sweep_table(result.cards))
    console.print_lines(screen, [f"{name} failed: {why}" for name, why in result.failed.items()])
    if "--debug" in sys.argv:
        console.print_lines(screen, [f"{n}: {text}" for n, text in result.tracebacks.items()])
    comparison = result.comparison
    if isinstance(comparison, Comparison):
        for table in tables.leaderboard(comparison):
            screen.print(table)
        sentences = [difference.sentence for difference in comparison.from_best()]
        console.print_lines(
            screen, [f"{sentence}." for sentence in [*comparison.remarks, *sentences]]
        )
        console.print_lines(screen, [f"Every pair is in {plan.folder / sweeping.DOCUMENT}."])
    elif len(result.cards) > 1:
        again = "to score a run again, delete its scorecard.json and give the same command"
        console.print_lines(screen, ["no comparison:", *(f"- {why}" for why in comparison), again])
    console.finish(as_json, sweeping.document(plan, result))
    if result.failed:
        raise typer.Exit(1)
