"""The answers a draft learns from: `generate`, by this project's engine or by a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from specdistill import options
from specdistill.cli import console
from specdistill.cli.arguments import Column, Device, Dtype, Json, Split, Target, Threads
from specdistill.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specdistill.data.store import Store

Engine = Literal["specdistill", "openai"]
# What the other engine has no use for.
_SERVERS = ("base_url", "concurrency")
_OURS = (
    *("batch_size", "signal", "dtype", "device", "threads"),
    *("min_tokens", "max_repetition", "drop_truncated", "drop_duplicates", "retries"),
    *("best_of", "scorer"),
)


def generate(
    context: typer.Context,
    target: Target,
    prompts: Annotated[
        str, typer.Option(help=".jsonl, .txt, datasets id, demo:train or demo:heldout.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the answers; an unfinished one is continued.")
    ],
    engine: Annotated[
        Engine, typer.Option(help="openai: a server, which knows --target by that name.")
    ] = "specdistill",
    base_url: Annotated[
        str | None, typer.Option(help="The server's, such as http://localhost:8000/v1.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Questions under way at once.", min=1)] = 8,
    style: Annotated[
        str, typer.Option(help="How prompts are put: instruction, in-context, chain-of-thought.")
    ] = "instruction",
    examples: Annotated[
        str | None, typer.Option(help="Prompts with responses, for --style in-context.")
    ] = None,
    shots: Annotated[int, typer.Option(help="Examples shown with each prompt.", min=1)] = 4,
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
    best_of: Annotated[
        int | None,
        typer.Option(help="Of so many answers to a prompt keep one, by --scorer.", min=1),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="log-probability, exact-match, majority, or a function, module:function."
        ),
    ] = None,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with the target, keeping its exact signal for distillation."""
    _refuse_given(context, f"--engine {engine}", _OURS if engine == "openai" else _SERVERS)
    if style != "in-context":
        _refuse_given(context, f"--style {style}", ("shots",))
    from specdistill.data.filters import Filters
    from specdistill.data.prompts import load_prompts
    from specdistill.data.scorers import BestOf
    from specdistill.data.styles import styled
    from specdistill.decoding import Sampling

    samplings = [Sampling(t, top_k, top_p, min_p) for t in options.temperatures(temperature)]
    filters = Filters(min_tokens, max_repetition, drop_truncated, drop_duplicates, retries)
    if (best_of is None) != (scorer is None):
        raise InputError(
            "--best-of and --scorer go together: how many answers, and what says which is best"
        )
    choice = None if best_of is None or scorer is None else BestOf(best_of, scorer)
    console.setup(threads)
    asked = styled(
        load_prompts(prompts, split=split, column=column, limit=limit),
        style,
        examples=[] if examples is None else load_prompts(examples),
        shots=shots,
        seed=seed,
    )
    screen = console.screen_for(as_json)
    if engine == "openai":
        from specdistill.data.answers import read_answers
        from specdistill.engines import openai

        if base_url is None:
            raise InputError("--engine openai needs --base-url, such as http://localhost:8000/v1")
        with console.progress() as progress:
            answers, refused = openai.answer(
                openai.Server(base_url, target, concurrency),
                asked,
                out,
                max_new_tokens=max_new_tokens,
                samplings=samplings,
                seed=seed,
                progress=progress,
            )
        said = read_answers(out)
        counts = {
            "answers": len(said),
            "empty": len(answers.done) - len(said),
            "cut": sum(not answer.ended for answer in said),
            "refused": len(refused),
        }
        console.print_lines(screen, [f"{len(said)} answers in {out}, as text"])
        console.print_lines(screen, _server_lines(counts, refused))
        if apart := sum(answer.reasoning is not None for answer in said):
            line = f"{apart} answers came with reasoning apart from the text, which no draft learns"
            console.print_lines(screen, [f"{line}: serve without a reasoning parser to have it"])
        console.finish(as_json, {"out": str(out), **counts, "reasoning_apart": apart})
        return

    from specdistill import models, packing
    from specdistill.data import generation
    from specdistill.data.chat import encode_prompt
    from specdistill.decoding import Request, SpeculativeDecoder

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
            best_of=choice,
            progress=progress,
        )
    screen.print(f"{len(store.done())} answers in {out}", soft_wrap=True)
    removing = filters.remove or choice is not None
    console.print_lines(screen, _store_lines(store, filtered=removing))
    document = {"out": str(out), "answers": len(store.done()), "parts": len(store.manifest.parts)}
    console.finish(as_json, {**document, **store.filtered(), **(store.tail() or {})})


def _refuse_given(context: typer.Context, beside: str, names: Sequence[str]) -> None:
    """An option without effect is an error."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect with {beside}; leave it out")


def _server_lines(counts: dict[str, int], refused: dict[str, str]) -> list[str]:
    lines = []
    if counts["cut"] or counts["empty"]:
        lines.append(f"{counts['cut']} cut at the limit, {counts['empty']} empty")
    if refused:
        prompt, reason = next(iter(refused.items()))
        lines.append(
            f"{len(refused)} prompts refused, and asked again by the same command; "
            f"{prompt!r}: {reason}"
        )
    return lines


def _store_lines(store: Store, filtered: bool) -> list[str]:
    lines = []
    if tail := store.tail():
        lines.append(
            f"outside the kept tokens: {tail['tail_mass']:.3%} of the target's probability; a "
            f"draft that learns what is kept and nothing else loses {tail['alpha_cost']:.4f} of α"
        )
    if filtered:
        counts = store.filtered()
        kinds = ", ".join(f"{number} {name}" for name, number in counts["removed"].items())
        lines.append(
            f"removed: {kinds or 'none'}; {counts['regenerated']} prompts answered in another way, "
            f"{counts['dropped']} without an answer"
        )
    return lines
