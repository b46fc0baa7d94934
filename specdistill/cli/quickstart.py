"""The whole loop in one command."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from specdistill import limits
from specdistill.cli import console, tables
from specdistill.cli.options import Json, Threads, among
from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.quickstart import Task
    from specdistill.scoring.scorecard import Scorecard


def quickstart(
    target: Annotated[
        str | None,
        typer.Option(help="Hugging Face id, folder or .gguf file; default: the embedded demo."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help=".jsonl, .txt or datasets id; default: the demo's prompts.")
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option(help="Prompts to score on; default: a part of the prompts, kept apart."),
    ] = None,
    minutes: Annotated[
        float | None,
        among(limits.POSITIVE, "Time for all of it; default: 30, and the demo's own for the demo."),
    ] = None,
    layers: Annotated[
        int | None,
        among(limits.COUNT, "The draft's layers, the target's first; default: by its depth."),
    ] = None,
    vocab_size: Annotated[
        int | None, among(limits.VOCABULARY, "The draft's output tokens; default: by the head.")
    ] = None,
    drafting: Annotated[
        Literal["parallel", "autoregressive"] | None,
        typer.Option(help="How the draft proposes; default: in parallel on a CPU, if it can."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: a new one under runs/.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole loop on your model and prompts: answers, draft, distillation, score, report; exit
    code 1 if decoding is not lossless. Without options it is a demo on an embedded model.
    """
    from specdistill import quickstart as loop
    from specdistill.run_folder import RunFolder
    from specdistill.scoring.headline import trained_line

    demo = loop.Task()
    task = loop.Task(
        target or demo.target,
        prompts or demo.prompts,
        heldout,
        minutes,
        layers,
        vocab_size,
        drafting,
    )
    console.setup(threads)
    folder = run_dir or _run_folder(Path("runs"), task)
    length = minutes or (8 if task == demo else loop.MINUTES)
    takes = f"about {length:g} {'minute' if length == 1 else 'minutes'}, in"
    known = "going on with" if folder.exists() else takes
    console.note(f"{known} {folder}")
    start = time.perf_counter()
    with console.progress() as progress:
        before, after = loop.quickstart(folder, task, progress=progress, note=console.note)
    out = console.screen_for(as_json)
    out.print(tables.before_after_table(before, after))
    run = RunFolder(folder)
    lines = [
        tables.evidence_line(after),
        after.verdict.reason,
        trained_line(after),
        f"Report: {run.report_page}, {run.report.name}   draft: {run.draft}   pictures: "
        f"{run.plots}",
        f"{time.perf_counter() - start:.0f} s in all",
        _next_step(folder, task, after),
    ]
    console.print_lines(out, [line for line in lines if line])
    console.finish(
        as_json, {"run_dir": str(folder), "before": before.document(), "after": after.document()}
    )
    if before.failures or after.failures:
        raise typer.Exit(1)


def _run_folder(parent: Path, task: Task) -> Path:
    """runs/quickstart, or the first quickstart-2, -3, ... that holds no run or an unfinished one of
    this task, which is continued.
    """
    from specdistill.quickstart import check_run

    number = 1
    while True:
        folder = parent / ("quickstart" if number == 1 else f"quickstart-{number}")
        try:
            check_run(folder, task)
        except InputError:
            number += 1
        else:
            return folder


def _next_step(folder: Path, task: Task, card: Scorecard) -> str:
    """The command that serves the draft where it pays, and else one that gives it more time."""
    from specdistill.quickstart import MINUTES
    from specdistill.run_folder import RunFolder

    if card.verdict.pays:
        words = ["export", "--draft", str(RunFolder(folder).draft), "--for", "vllm"]
        return f"Next: {shlex.join(['specdistill', *words, '--out', f'{folder}/served'])}"
    words = ["specdistill", "quickstart"]
    for name in ("target", "prompts", "heldout", "layers", "vocab_size", "drafting"):
        if (value := getattr(task, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--minutes", f"{2 * (task.minutes or MINUTES):g}"]
    return f"With more time: {shlex.join(words)}"
