"""What a draft learns from: `generate`, by this project's engine, Transformers' or a server's, and
`widen`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdistill import limits
from specdistill.cli import console, parsing
from specdistill.cli.options import (
    BatchSize,
    Column,
    Device,
    Dtype,
    Json,
    Limit,
    LongestAnswer,
    Prompts,
    Seed,
    Split,
    Target,
    Threads,
    among,
)
from specdistill.errors import InputError
from specdistill.files import held, keep_apart, lock_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Sized

    from specdistill.data.draft_gain import Gain
    from specdistill.data.text_store import Settled
    from specdistill.data.token_store import Store

Engine = Literal["specdistill", "transformers", "openai"]
# What an engine has no use for.
_SERVERS = ("base_url", "concurrency")
_DRAFTS = ("draft", "num_draft_tokens")
_LOCAL = ("batch_size", "signal", "dtype", "device", "threads", "generator", "match")
_NO_USE: dict[str, tuple[str, ...]] = {
    "specdistill": _SERVERS,
    "transformers": _SERVERS + _DRAFTS,
    "openai": _LOCAL + _DRAFTS,
}


def generate(
    context: typer.Context,
    target: Target,
    prompts: Prompts,
    out: Annotated[
        Path, typer.Option(help="Folder of the answers; an unfinished one is continued.")
    ],
    engine: Annotated[
        Engine,
        typer.Option(
            help="Who decodes; transformers: its `generate`; openai: a server, which knows "
            "--target by that name."
        ),
    ] = "specdistill",
    base_url: Annotated[
        str | None, typer.Option(help="The server's, such as http://localhost:8000/v1.")
    ] = None,
    concurrency: Annotated[int, among(limits.ROWS, "Questions under way at once.")] = 8,
    style: Annotated[
        str, typer.Option(help="How prompts are put: instruction, in-context, chain-of-thought.")
    ] = "instruction",
    examples: Annotated[
        str | None, typer.Option(help="Prompts with responses, for --style in-context.")
    ] = None,
    shots: Annotated[int, among(limits.SHOTS, "Examples shown with each prompt.")] = 4,
    max_new_tokens: LongestAnswer = 256,
    temperature: Annotated[
        str, typer.Option(help="0 is greedy; with 0,1 each prompt gets one of the two.")
    ] = "0",
    top_k: Annotated[int, among(limits.TOP_K, "0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    response_column: Annotated[
        str | None,
        typer.Option(help="Field of the prompts' own answers, for --scorer, if there are several."),
    ] = None,
    signal: Annotated[
        str,
        typer.Option(
            help="What to keep of the target for distillation: states (exact), top-k:64 or none."
        ),
    ] = "states",
    min_tokens: Annotated[
        int, among(limits.LEAST_TOKENS, "Remove shorter answers; of a server, in words.")
    ] = 0,
    max_repetition: Annotated[
        float, among(limits.SHARE, "Remove answers with a larger share of repeated 4-grams.")
    ] = 1.0,
    drop_truncated: Annotated[
        bool, typer.Option("--drop-truncated", help="Remove answers cut at --max-new-tokens.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Of equal answers keep one.")
    ] = False,
    retries: Annotated[
        int, among(limits.RETRIES, "Ask again so often, sampling anew, for what was removed.")
    ] = 0,
    best_of: Annotated[
        int | None,
        among(limits.ANSWERS, "Of so many answers to a prompt keep one, by --scorer."),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="log-probability, exact-match, majority, or a function, module:function."
        ),
    ] = None,
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
    draft: Annotated[
        str | None, typer.Option(help="Decode speculatively with this draft: lossless, and timed.")
    ] = None,
    num_draft_tokens: Annotated[int, among(limits.DRAFT_TOKENS, "γ, with --draft.")] = 4,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with the target, keeping its exact signal for distillation."""
    _refuse_given(context, f"--engine {engine}", _NO_USE[engine])
    keep_apart([out], [None if engine == "openai" else target, prompts, examples, generator, draft])
    if style != "in-context":
        _refuse_given(context, f"--style {style}", ("shots",))
    from specdistill.data.filters import Filters
    from specdistill.data.prompts import load_prompts
    from specdistill.data.scorers import BestOf, matched_number
    from specdistill.data.selection import Selection
    from specdistill.data.signal import kept_tokens
    from specdistill.data.styles import styled
    from specdistill.decoding import Sampling

    if scorer is None:
        _refuse_given(context, "no --scorer, which alone reads it,", ("response_column",))
    samplings = [Sampling(t, top_k, top_p, min_p) for t in parsing.temperatures(temperature)]
    filters = Filters(min_tokens, max_repetition, drop_truncated, drop_duplicates, retries)
    kept_tokens(signal)
    if draft is None:
        _refuse_given(context, "plain decoding", ("num_draft_tokens",))
    if (best_of is None) != (scorer is None):
        raise InputError(
            "--best-of and --scorer go together: how many answers, and what says which is best"
        )
    if (generator is None) != (match is None) or (generator and best_of is None):
        raise InputError(
            "--generator, --match and --best-of go together: who answers, what its answers may "
            "cost, and how many of the target's that is"
        )
    price = None if match is None else parsing.match(match)
    choice = None
    if best_of is not None and scorer is not None and generator is None:
        choice = BestOf(best_of, scorer)
    removing = filters.remove or best_of is not None
    console.setup(threads)
    context.with_resource(held(out))  # before long work
    asked = styled(
        load_prompts(
            prompts, split=split, column=column, response_column=response_column, limit=limit
        ),
        style,
        examples=[] if examples is None else load_prompts(examples),
        shots=shots,
        seed=seed,
    )
    wanted = None if best_of is None or scorer is None else BestOf(best_of, scorer)
    Selection.checked(filters, wanted, asked, samplings)  # before a model is loaded
    screen = console.screen_for(as_json)
    if engine == "openai":
        from specdistill.engines import openai

        if base_url is None:
            raise InputError("--engine openai needs --base-url, such as http://localhost:8000/v1")
        with console.progress() as progress:
            settled, refused = openai.answer(
                openai.Server(base_url, target, concurrency),
                asked,
                out,
                max_new_tokens=max_new_tokens,
                samplings=samplings,
                seed=seed,
                filters=filters,
                best_of=choice,
                progress=progress,
            )
        _finish_text(settled, refused, out, removing=removing, as_json=as_json)
        return

    from specdistill import models
    from specdistill.data import generation
    from specdistill.data.chat import encode_prompt
    from specdistill.data.draft_gain import measure_gain
    from specdistill.decoding import ModelDrafter, Request, SpeculativeDecoder
    from specdistill.decoding.sampling import own_sampling
    from specdistill.models import packing

    gamma = 0 if draft is None else num_draft_tokens
    rows = batch_size * (gamma + 1)  # of a verify pass
    model = packing.pack(models.load(target, dtype=dtype, device=device), rows)
    author, writer = model, None
    if generator is not None and best_of is not None and scorer is not None:
        writer = models.load(generator, dtype=dtype, device=device)
        models.check_pair(model, writer)
        ratio = price or model.parameters() / writer.parameters()
        choice = BestOf(matched_number(best_of, ratio), scorer)
        author = packing.pack(writer, rows)
        console.note(f"{choice.number} answers of {generator} for {best_of} of the target's")
    small, drafter = None, None
    if draft is not None:
        small = packing.pack(models.load(draft, dtype=dtype, device=device), batch_size)
        models.check_pair(author, small)
        drafter = ModelDrafter(small, author.vocab_size)
    console.note_models(*filter(None, (model, writer, small)))
    decoder = SpeculativeDecoder(author, drafter, num_draft_tokens=gamma, batch_size=batch_size)
    requests = [
        Request(
            p.id,
            encode_prompt(model.tokenizer, p),
            max_new_tokens,
            own_sampling(samplings, seed, p.id),
            seed,
        )
        for p in asked
    ]
    console.note_cache(decoder.cache_size(requests))
    written = len(asked) * filters.written
    if size := generation.signal_bytes(model, written, max_new_tokens, signal):
        console.note(
            f"the signal of {len(asked)} answers takes at most {size:,} bytes in {out}, "
            f"{size // (written * max_new_tokens):,} a token"
        )
    outside = None
    if engine == "transformers":
        from specdistill.engines.transformers import Batches

        outside = engine, Batches(author, batch_size)
    gain, start = None, time.perf_counter()
    if small is not None:
        gain = measure_gain(author, small, gamma, requests, batch_size)
        console.note(_gain_line(gain))
    measuring = time.perf_counter() - start
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
            writer=writer,
            draft=small,
            num_draft_tokens=gamma,
            outside=outside,
            progress=progress,
        )
    screen.print(f"{len(store.done())} answers in {out}", soft_wrap=True)
    console.print_lines(screen, _store_lines(store, filtered=removing))
    document = {
        "out": str(out),
        "answers": len(store.done()),
        "parts": len(store.manifest.parts),
    }
    if gain is not None:
        seconds = time.perf_counter() - start
        saved = store.decoding_seconds * (gain.ratio - 1) - measuring
        line = f"{seconds:.0f} s, {measuring:.0f} of them to measure the draft; at the measured "
        line += f"rates about {seconds + saved:.0f} s without it"
        console.print_lines(screen, [line])
        document |= {"draft_gain": gain.ratio, "seconds": seconds, "seconds_saved": saved}
    if choice is not None:
        document["best_of"] = choice.number
    _refuse_nothing(store.done(), out, store.filtered()["removed"])
    console.finish(as_json, {**document, **store.filtered(), **(store.tail() or {})})


def widen(
    target: Target,
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
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    limit: Limit = None,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Have the target write more prompts like those there are, without near duplicates."""
    from specdistill.data.prompts import load_prompts
    from specdistill.data.widening import Widening
    from specdistill.data.widening import widen as write

    keep_apart([out, out.with_name(f"{out.name}.json")], [target, prompts])
    plan = Widening(count, shots, max_similarity, max_new_tokens, temperature, seed)
    console.setup(threads)
    from specdistill import models
    from specdistill.models import packing

    known = load_prompts(prompts, split=split, column=column, limit=limit)
    with held(lock_of(out)), console.progress() as progress:
        model = packing.pack(models.load(target, dtype=dtype, device=device), batch_size)
        console.note_models(model)
        found = write(model, known, out, plan, batch_size=batch_size, progress=progress)
    lines = [f"{len(found.prompts)} prompts in {out}"]
    if found.removed:
        lines.append(f"removed: {_by_kind(found.removed)}")
    if len(found.prompts) < count:
        lines.append(f"too few of the drafts were new; {count} were wanted")
    console.print_lines(console.screen_for(as_json), lines)
    console.finish(
        as_json, {"out": str(out), "prompts": len(found.prompts), "removed": dict(found.removed)}
    )


def _refuse_given(context: typer.Context, beside: str, names: Sequence[str]) -> None:
    """An option without effect is an error."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect with {beside}; leave it out")


def _gain_line(gain: Gain) -> str:
    ends = "" if gain.ratio > 1 else "; here it does not pay: leave --draft out"
    return (
        f"with the draft {gain.drafted:,.1f} tokens/s, without {gain.plain:,.1f}: {gain.ratio:.2f} "
        f"times, measured on {gain.prompts} prompts decoded both ways; {gain.tokens_per_call:.2f} "
        f"tokens per target call{ends}"
    )


def _finish_text(
    settled: Settled, refused: dict[str, str], out: Path, *, removing: bool, as_json: bool
) -> None:
    """What came of asking a server."""
    said = [answer for answer in settled.kept if (answer.prompt.response or "").strip()]
    counts = {
        "answers": len(said),
        "empty": len(settled.kept) - len(said),
        "cut": sum(not answer.ended for answer in said),
        "refused": len(refused),
    }
    lines = [f"{len(said)} answers in {out}, as text", *_server_lines(counts, refused)]
    if removing:
        lines.append(_removed_line(settled.counts))
    if settled.unvaried > 1:
        lines.append(
            f"the server gave {settled.unvaried} prompts the same reply each time: it does "
            "not sample (some do if the checkpoint's generation_config.json has do_sample: true)"
        )
    if apart := sum(answer.reasoning is not None for answer in said):
        line = f"{apart} answers came with reasoning apart from the text, which a draft learns "
        line += "where its chat template writes 'reasoning_content'"
        lines.append(f"{line}; else serve without a reasoning parser to have it")
    console.print_lines(console.screen_for(as_json), lines)
    _refuse_nothing(said, out, settled.removed)
    told = {"out": str(out), **counts, "reasoning_apart": apart, **settled.counts}
    console.finish(as_json, told)


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
        lines.append(_removed_line(store.filtered()))
    return lines


def _removed_line(counts: Mapping[str, Any]) -> str:
    return (
        f"removed: {_by_kind(counts['removed']) or 'none'}; {counts['regenerated']} prompts "
        f"answered in another way, {counts['dropped']} without an answer"
    )


def _refuse_nothing(answers: Sized, out: Path, removed: Mapping[str, int]) -> None:
    if not len(answers):
        advice = (
            "loosen what removes them, in another folder" if removed else "the line above says why"
        )
        raise InputError(f"no answer is left in {out}; {advice}")


def _by_kind(removed: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in removed.items())
