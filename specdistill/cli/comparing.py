"""What drafts are worth beside each other: `check`, `compare`, `plot`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from specdistill import limits
from specdistill.cli import console, tables
from specdistill.cli.options import (
    Column,
    Device,
    Draft,
    Dtype,
    Json,
    Seed,
    Split,
    Target,
    Threads,
    among,
)
from specdistill.errors import InputError
from specdistill.files import keep_apart


def check(
    target: Target,
    draft: Draft,
    prompts: Annotated[
        str | None, typer.Option(help="As for `score`; default: a few that are built in.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer.", min=2, max=limits.NEW_TOKENS.le)
    ] = 32,
    limit: Annotated[int, among(limits.COUNT, "Use only the first so many prompts.")] = 8,
    seed: Seed = 0,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Test on this machine that decoding with the draft is lossless; exit code 1 if it is not."""
    if prompts is None and (split or column):
        raise InputError("--split and --column choose from a `datasets` id: name it in --prompts")
    console.setup(threads)
    from specdistill.data.chat import encoded
    from specdistill.data.prompts import load_prompts
    from specdistill.scoring import check as checks
    from specdistill.scoring.lossless import FALSE_ALARM

    asked = checks.built_in_prompts(limit)
    if prompts is not None:
        asked = load_prompts(prompts, split=split, column=column, limit=limit)
    big, small = console.load_pair(target, draft, dtype, device)
    pair = checks.Pair(big, small, encoded(big.tokenizer, asked), max_new_tokens, seed)
    console.note(pair.cache_size().line)
    with console.progress() as progress:
        results = checks.run_checks(pair, progress)
    passed = all(result.passed for result in results)
    screen = console.screen_for(as_json)
    screen.print(tables.checks_table(results))
    verdict = "lossless, as far as was checked" if passed else "NOT lossless"
    chance = f"a check that looks at chance fails in fewer than 1 of {1 / FALSE_ALARM:,.0f}"
    console.print_lines(
        screen, [*tables.difference_lines(results), f"{verdict}; {chance} sound runs"]
    )
    console.finish(as_json, {"passed": passed, "checks": [asdict(result) for result in results]})
    if not passed:
        raise typer.Exit(1)


def compare(
    cards: Annotated[
        list[Path], typer.Argument(help="Scorecards, or folders with a scorecard.json.")
    ],
    out: Annotated[Path | None, typer.Option(help="JSON file for the comparison.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Rank scorecards by measured speed; exit code 1 if they cannot be compared."""
    from specdistill.scoring import compare as comparison
    from specdistill.scoring.comparable import card_file, read_cards
    from specdistill.scoring.scorecard import write_json

    if out is not None:
        keep_apart([out], map(card_file, cards))
        console.must_be_free(out, overwrite)
    named = read_cards(cards)
    screen = console.screen_for(as_json)
    try:
        ranking = comparison.compare(named)
    except comparison.Incomparable as error:
        lines = ["these scorecards cannot be compared:", *(f"- {why}" for why in error.reasons)]
        console.print_lines(screen, lines)
        console.finish(as_json, comparison.refusal(error.reasons))
        raise typer.Exit(1) from None
    for table in (*tables.leaderboard(ranking), *tables.by_cost_tables(ranking)):
        screen.print(table)
    sentences = [*ranking.remarks, *(difference.sentence for difference in ranking.differences)]
    sentences += [pair.sentence for pair in ranking.by_cost]
    console.print_lines(screen, [f"{sentence}." for sentence in sentences])
    if out is not None:
        write_json(ranking.document(), out)
    console.finish(as_json, ranking.document())


def plot(
    sources: Annotated[
        list[Path], typer.Argument(help="A run folder; or several, or scorecards, to compare.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; default: plots/ in a run folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a run folder, and write its report; or several drafts in one picture."""
    from specdistill.report import write_report
    from specdistill.report.plots import plot_all, plot_together
    from specdistill.run_folder import RunFolder

    alone = len(sources) == 1 and not sources[0].is_file()
    if not alone and out is None:
        raise InputError("pictures of scorecards or of several runs need --out, a folder for them")
    if out is not None:
        names = ("acceptance", "survival", "places", "speedup", "time", "text", "training", "runs")
        keep_apart([out / f"{name}.png" for name in names], sources if not alone else [])
        keep_apart([out], [source for source in sources if source.is_file()])
    note = console.note
    if not alone and out:
        drawn = plot_together(sources, out, note)
    else:
        drawn = plot_all(sources[0], out, note)
    files = [str(file) for file in drawn]
    if alone and not RunFolder(sources[0]).scorecard.exists():
        note(f"{sources[0]} has no scorecard.json yet: its training alone is drawn, no report")
    elif alone and out is None:
        report = write_report(sources[0])
        files += [str(report), str(report.with_suffix(".html"))]
    for source in () if alone else sources:
        if not RunFolder(source).metrics.exists():
            console.note(f"{source} is no run with a metrics.jsonl: no training curve of it")
    console.screen_for(as_json).print("\n".join(files), soft_wrap=True)
    console.finish(as_json, {"files": files})
