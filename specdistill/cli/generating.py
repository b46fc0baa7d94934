"""What a draft learns from: `generate`, by models on this machine, and `widen`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from specdistill import limits
from specdistill.cli import answers, console, options, parsing
from specdistill.cli.options import among
from specdistill.cli.serving import Serving
from specdistill.errors import InputError
from specdistill.files import keep_apart


def generate(
    target: options.Target,
    prompts: options.Prompts,
    out: options.Answers,
    engine: Annotated[
        Literal["specdistill", "transformers", "vllm"],
        typer.Option(help="Who decodes; transformers: its `generate`."),
    ] = "specdistill",
    engine_python: options.EnginePython = None,
    workers: Annotated[
        int | None, among(limits.WORKERS, "With --engine vllm: engines at a time; 1.")
    ] = None,
    tensor_parallel: options.TensorParallel = None,
    engine_options: options.EngineOptions = None,
    style: options.Style = "instruction",
    examples: options.Examples = None,
    shots: options.Shots = None,
    max_new_tokens: options.LongestAnswer = 256,
    temperature: options.Temperatures = "0",
    top_k: Annotated[int, among(limits.TOP_K, "0 is off.")] = 0,
    top_p: options.TopP = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 32,
    limit: options.Limit = None,
    turns: options.Turns = "last",
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    response_column: options.ResponseColumn = None,
    signal: Annotated[
        str,
        typer.Option(
            help="What to keep of the target for distillation: states (exact), top-k:64 or none."
        ),
    ] = "states",
    min_tokens: Annotated[int, among(limits.LEAST_TOKENS, "Remove shorter answers.")] = 0,
    max_repetition: options.MaxRepetition = 1.0,
    drop_truncated: options.DropTruncated = False,
    drop_duplicates: options.DropDuplicates = False,
    retries: options.Retries = 0,
    best_of: options.Best = None,
    scorer: options.Scorer = None,
    generator: Annotated[
        str | None,
        typer.Option(help="A cheaper model of the target's tokens that answers in its place."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="How many answers of --generator for the --best-of of the target: as many as cost "
            "the same compute, or cost:X, where one of the target's costs X of its own."
        ),
    ] = None,
    split: options.Split = None,
    column: options.Column = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Answer prompts with the target, keeping its exact signal for distillation."""
    keep_apart([out], [target, prompts, examples, generator])
    from specdistill.data.filters import Filters
    from specdistill.data.scorers import LOG_PROBABILITY
    from specdistill.decoding import Sampling

    samplings = [Sampling(t, top_k, top_p, min_p) for t in parsing.temperatures(temperature)]
    filters = Filters(min_tokens, max_repetition, drop_truncated, drop_duplicates, retries)
    choice = answers.choice(best_of, scorer)
    if (generator is None) != (match is None) or (generator and choice is None):
        raise InputError(
            "--generator, --match and --best-of go together: who answers, what its answers may "
            "cost, and how many of the target's that is"
        )
    matched = None if match is None else parsing.match(match)
    serving = Serving(engine_python, workers, tensor_parallel, engine_options)
    serving.check(engine, device, generator)
    writer = None if generator is None else console.loader(generator, dtype, device)
    console.setup(threads)
    kwargs = parsing.chat_template_kwargs(chat_template_kwargs)
    read = answers.read(prompts, split, column, limit, response_column, scorer, turns, kwargs)
    asked = answers.put(read, style, examples, shots, seed)
    from specdistill.data import generation

    load = console.loader(target, dtype, device)
    with ExitStack() as stack, console.progress() as progress:
        outside = None
        if engine == "transformers":
            from specdistill.data.outside import Outside
            from specdistill.engines.transformers import Batches

            outside = Outside(engine, Batches)
        elif engine == "vllm":
            scored = choice is not None and choice.scorer == LOG_PROBABILITY
            load, outside = serving.outside(target, dtype, signal, scored, threads, stack)
        store = generation.generate(
            load,
            asked,
            out,
            max_new_tokens=max_new_tokens,
            samplings=samplings,
            seed=seed,
            batch_size=batch_size,
            signal=signal,
            filters=filters,
            best_of=choice,
            writer=writer,
            match=matched,
            outside=outside,
            progress=progress,
            note=console.note,
        )
    removing = filters.remove or choice is not None
    answers.finish(store, removing=removing, as_json=as_json)


def widen(
    target: options.Target,
    prompts: Annotated[
        str, typer.Option(help="The prompts there are: .jsonl, .txt, datasets id or demo:train.")
    ],
    out: Annotated[Path, typer.Option(help=".jsonl to write; an unfinished one is continued.")],
    count: Annotated[int, among(limits.COUNT, "How many more prompts are wanted.")],
    shots: Annotated[int, among(limits.SHOTS, "Prompts shown as examples each time.")] = 6,
    max_similarity: Annotated[
        float, among(limits.SHARE, "Remove what is more like a known prompt (ROUGE-L).")
    ] = 0.7,
    max_new_tokens: Annotated[int, among(limits.NEW_TOKENS, "Longest prompt.")] = 96,
    temperature: Annotated[float, typer.Option()] = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 32,
    limit: options.Limit = None,
    split: options.Split = None,
    column: options.Column = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Have the target write more prompts like those there are, without near duplicates."""
    from specdistill.data.prompts import load_prompts
    from specdistill.data.widening import Widening
    from specdistill.data.widening import widen as write

    keep_apart([out, out.with_name(f"{out.name}.json")], [target, prompts])
    plan = Widening(count, shots, max_similarity, max_new_tokens, temperature, seed)
    console.setup(threads)
    known = load_prompts(prompts, split=split, column=column, limit=limit)
    model = console.loader(target, dtype, device)
    with console.progress() as progress:
        written = write(model, known, out, plan, batch_size=batch_size, progress=progress)
    lines = [f"{len(written.prompts)} prompts in {out}"]
    if written.removed:
        lines.append(f"removed: {answers.by_kind(written.removed)}")
    if len(written.prompts) < count:
        lines.append(f"too few of the drafts were new; {count} were wanted")
    console.print_lines(console.screen_for(as_json), lines)
    document = {"prompts": len(written.prompts), "removed": dict(written.removed)}
    console.finish(as_json, {"out": str(out), **document})
