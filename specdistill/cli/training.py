"""From a target to a draft: `init`, `generate`, `distill`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from specdistill import options, tables
from specdistill.cli import console
from specdistill.cli.arguments import Column, Device, Dtype, Json, Split, Target, Threads
from specdistill.errors import InputError


def init(
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder of the new draft.")],
    layers: Annotated[
        str, typer.Option(help="How many first layers to keep, or which: 4 or 0,1,29.")
    ] = "4",
    vocab_size: Annotated[int | None, typer.Option(help="Keep only so many output tokens.")] = None,
    vocab_from: Annotated[
        str | None,
        typer.Option(help="Data to count tokens in: a folder of `generate`, .jsonl or .txt."),
    ] = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Make a draft from some layers of the target and, if wanted, part of its vocabulary."""
    from specdistill import drafts, models
    from specdistill.data.texts import token_lists

    if (vocab_size is None) != (vocab_from is None):
        raise InputError(
            "--vocab-size and --vocab-from go together: how many tokens, and the data to count "
            "them in"
        )
    console.must_be_new(out)
    console.setup(None)
    model = models.load(target, dtype=dtype, device="cpu")
    kept = drafts.parse_layers(layers, model.num_layers)
    vocabulary = None
    if vocab_size is not None and vocab_from is not None:
        usage = drafts.count_tokens(model, token_lists(vocab_from, model.tokenizer))
        vocabulary = drafts.choose_vocabulary(model, usage, vocab_size)
    draft = drafts.make_draft(model, kept, None if vocabulary is None else vocabulary.ids)
    drafts.save_draft(draft, out)
    ratio = draft.weight_bytes() / model.weight_bytes()
    table = Table("", "target", "draft", title=f"{out}")
    table.add_row("parameters", f"{model.parameters():,}", f"{draft.parameters():,}")
    table.add_row("layers", str(model.num_layers), ", ".join(map(str, kept)))
    table.add_row("output tokens", f"{model.vocab_size:,}", f"{draft.vocab_size:,}")
    table.add_row("bytes read per token", f"{model.weight_bytes():,}", f"{draft.weight_bytes():,}")
    screen = console.screen_for(as_json)
    screen.print(table)
    screen.print(f"cost ratio by bytes: {ratio:.3f}")
    if vocabulary is not None:
        screen.print(f"the kept tokens are {vocabulary.coverage:.2%} of the tokens in {vocab_from}")
    console.finish(
        as_json,
        {
            "out": str(out),
            "layers": kept,
            "parameters": draft.parameters(),
            "bytes_per_token": draft.weight_bytes(),
            "cost_ratio_bytes": ratio,
            "coverage": None if vocabulary is None else vocabulary.coverage,
        },
    )


def generate(
    target: Target,
    prompts: Annotated[
        str, typer.Option(help=".jsonl, .txt, datasets id, demo:train or demo:heldout.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the answers; an unfinished one is continued.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[
        str, typer.Option(help="0 is greedy; with 0,1 each prompt gets one of the two.")
    ] = "0",
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    batch_size: Annotated[int, typer.Option(help="Rows decoded together.", min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many prompts.")] = None,
    signal: Annotated[
        str,
        typer.Option(
            help="What to keep of the target for distillation: states (exact), top-k:64 or none."
        ),
    ] = "states",
    min_tokens: Annotated[int, typer.Option(help="Remove shorter answers.", min=0)] = 0,
    max_repetition: Annotated[
        float, typer.Option(help="Remove answers with a larger share of repeated 4-grams.")
    ] = 1.0,
    drop_truncated: Annotated[
        bool, typer.Option("--drop-truncated", help="Remove answers cut at --max-new-tokens.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Remove answers kept before.")
    ] = False,
    retries: Annotated[
        int, typer.Option(help="Ask again so often, sampling anew, for what was removed.", min=0)
    ] = 0,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with the target, keeping its exact signal for distillation."""
    from specdistill import models, packing
    from specdistill.data import generation
    from specdistill.data.chat import encode_prompt
    from specdistill.data.filters import NO_FILTER, Filters
    from specdistill.data.prompts import load_prompts
    from specdistill.decoding import Request, Sampling, SpeculativeDecoder

    samplings = [Sampling(t, top_k, top_p, min_p) for t in options.temperatures(temperature)]
    filters = Filters(min_tokens, max_repetition, drop_truncated, drop_duplicates, retries)
    console.setup(threads)
    asked = load_prompts(prompts, split=split, column=column, limit=limit)
    model = packing.pack(models.load(target, dtype=dtype, device=device), batch_size)
    console.note_models(model)
    requests = [Request(p.id, encode_prompt(model.tokenizer, p), max_new_tokens) for p in asked]
    console.note_cache(SpeculativeDecoder(model, batch_size=batch_size).cache_size(requests))
    if size := generation.signal_bytes(model, len(asked), max_new_tokens, signal):
        console.note(f"the signal of {len(asked)} answers takes at most {size:,} bytes in {out}")
    with console.progress() as progress:
        store = generation.generate(
            model,
            asked,
            out,
            max_new_tokens=max_new_tokens,
            samplings=samplings,
            seed=seed,
            batch_size=batch_size,
            signal=signal,
            filters=filters,
            progress=progress,
        )
    screen, tail = console.screen_for(as_json), store.tail()
    screen.print(f"{len(store.done())} answers in {out}", soft_wrap=True)
    if tail is not None:
        screen.print(
            f"outside the kept tokens: {tail['tail_mass']:.3%} of the target's probability; a "
            f"draft that learns what is kept and nothing else loses {tail['alpha_cost']:.4f} of α",
            soft_wrap=True,
        )
    counts = store.filtered()
    if filters != NO_FILTER:
        kinds = ", ".join(f"{number} {name}" for name, number in counts["removed"].items())
        screen.print(
            f"removed: {kinds or 'none'}; {counts['regenerated']} prompts answered in another way, "
            f"{counts['dropped']} without an answer"
        )
    document = {"out": str(out), "answers": len(store.done()), "parts": len(store.manifest.parts)}
    console.finish(as_json, {**document, **counts, **(tail or {})})


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
    from specdistill import distill as distillation
    from specdistill import heads, models
    from specdistill.distiller import configured_objective

    configured_objective(settings)  # before the models are read

    whole = settings.signal == "live" or settings.decode is not None
    read = models.load if whole else heads.load_head
    target = read(settings.target, dtype=settings.dtype, device=settings.device)
    student = models.load(settings.draft, dtype="float32", device=settings.device)
    models.check_pair(target, student)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        distillation.distill(settings, target, student, resume=resume)
        return
    console.note_models(target, student, decoding=False)
    with console.progress() as progress:
        folder = distillation.distill(settings, target, student, resume=resume, progress=progress)
    last = (folder.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    metrics = json.loads(last)
    console.screen_for(as_json).print(
        f"{tables.heldout_line(metrics)}; draft in {folder}",
        soft_wrap=True,
    )
    console.finish(as_json, {"draft": str(folder), **metrics})
