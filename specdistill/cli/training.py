"""From a target to a draft: `init`, `distill`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from specdistill import limits
from specdistill.cli import console, tables
from specdistill.cli.options import Dtype, Json, Target, Threads, among
from specdistill.errors import InputError
from specdistill.files import keep_apart


def init(
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder of the new draft.")],
    layers: Annotated[
        str, typer.Option(help="How many first layers to keep, or which: 4 or 0,1,29.")
    ] = "4",
    vocab_size: Annotated[
        int | None, among(limits.VOCABULARY, "Keep only so many output tokens.")
    ] = None,
    vocab_from: Annotated[
        str | None,
        typer.Option(
            help="Where the tokens are used: a folder of `generate` (by the target's own "
            "probabilities where it keeps states), .jsonl or .txt (by counts)."
        ),
    ] = None,
    random_seed: Annotated[
        int | None,
        among(limits.SEED, "Take the shape alone, with random weights: training from scratch."),
    ] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Make a draft from some layers of the target and, if wanted, part of its vocabulary."""
    if (vocab_size is None) != (vocab_from is None):
        raise InputError(
            "--vocab-size and --vocab-from go together: how many tokens, and the data to count "
            "them in"
        )
    from specdistill.drafts import making

    wanted = making.parse_layers(layers)  # before a model is read
    keep_apart([out], [target, vocab_from])
    console.setup(None)
    model, draft, numbers, vocabulary = making.write_draft(
        target,
        out,
        wanted,
        vocab_size=vocab_size,
        vocab_from=vocab_from,
        random_seed=random_seed,
        dtype=dtype,
    )
    ratio = draft.weight_bytes() / model.weight_bytes()
    table = Table("", "target", "draft", title=f"{out}")
    table.add_row("parameters", f"{model.parameters():,}", f"{draft.parameters():,}")
    table.add_row("layers", str(model.num_layers), ", ".join(map(str, numbers)))
    table.add_row("output tokens", f"{model.vocab_size:,}", f"{draft.vocab_size:,}")
    table.add_row("bytes read per token", f"{model.weight_bytes():,}", f"{draft.weight_bytes():,}")
    screen = console.screen_for(as_json)
    screen.print(table)
    screen.print(f"cost ratio by bytes: {ratio:.3f}")
    if vocabulary is not None:
        share = f"{vocabulary.coverage:.2%} of {vocabulary.unit}"
        screen.print(f"the kept tokens are {share} in {vocab_from}")
    console.finish(
        as_json,
        {
            "out": str(out),
            "layers": numbers,
            "parameters": draft.parameters(),
            "bytes_per_token": draft.weight_bytes(),
            "cost_ratio_bytes": ratio,
            "coverage": None if vocabulary is None else vocabulary.coverage,
            "coverage_of": None if vocabulary is None else vocabulary.unit,
        },
    )


def distill(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, section.key=value ...")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in run_dir.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Distil a draft as a configuration file says."""
    from specdistill.config import load_config

    settings = load_config(config, overrides or [])
    console.setup(threads)
    from specdistill.run_folder import RunFolder, given_config, read_metrics
    from specdistill.training import run
    from specdistill.training.pair import read_models
    from specdistill.training.processes import first_process, leave_processes

    given_config(config, settings, resume)
    last: dict[str, Any] = {}
    with run.begun(settings, resume):
        target, draft = read_models(settings)
        if first_process():
            console.note_models(*filter(None, (target, draft)), decoding=False)
            show = partial(console.note_example, draft.tokenizer)
            with console.progress() as progress:
                run.train(settings, target, draft, resume=resume, show=show, progress=progress)
            last = read_metrics(RunFolder(Path(settings.run_dir)).metrics)[-1]
        else:
            run.train(settings, target, draft, resume=resume)
    leave_processes()
    if not first_process():  # the first one speaks
        return
    folder = RunFolder(Path(settings.run_dir)).draft
    screen = console.screen_for(as_json)
    screen.print(f"{tables.heldout_line(last)}; draft in {folder}", soft_wrap=True)
    console.finish(as_json, {"draft": str(folder), **last})
