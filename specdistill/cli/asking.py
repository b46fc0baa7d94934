"""What a draft learns from where the target is a server's: `ask`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdistill import limits
from specdistill.cli import answers, console, options, parsing
from specdistill.cli.options import among
from specdistill.errors import InputError
from specdistill.files import keep_apart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specdistill.data.outside import OutsideDecoder
    from specdistill.data.prompts import Prompt
    from specdistill.data.text_store import Settled
    from specdistill.engines.openai_servers import Server
    from specdistill.models import LanguageModel


def ask(
    base_url: Annotated[
        list[str],
        typer.Option(
            help="The server's, such as http://localhost:8000/v1; more than one share the work."
        ),
    ],
    target: Annotated[str, typer.Option(help="The model's name there.")],
    prompts: options.Prompts,
    out: options.Answers,
    concurrency: Annotated[
        int, among(limits.QUESTIONS, "Questions under way at once at a server.")
    ] = 8,
    signal: Annotated[
        str | None,
        typer.Option(
            help="Keep the target's most probable tokens as well, as many as the server tells: "
            "top-k:20."
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="With --signal: the target's Hugging Face id or folder, for tokenizer and head."
        ),
    ] = None,
    style: options.Style = "instruction",
    examples: options.Examples = None,
    shots: options.Shots = None,
    max_new_tokens: options.LongestAnswer = 256,
    temperature: options.Temperatures = "0",
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    limit: options.Limit = None,
    response_column: options.ResponseColumn = None,
    min_words: Annotated[int, among(limits.LEAST_TOKENS, "Remove shorter answers.")] = 0,
    max_repetition: options.MaxRepetition = 1.0,
    drop_truncated: options.DropTruncated = False,
    drop_duplicates: options.DropDuplicates = False,
    retries: options.Retries = 0,
    best_of: options.Best = None,
    scorer: options.Scorer = None,
    split: options.Split = None,
    column: options.Column = None,
    as_json: options.Json = False,
) -> None:
    """Have a server with OpenAI's protocol answer prompts; a draft learns from the text, and with
    --signal from the target's most probable tokens. The key comes from the environment,
    OPENAI_API_KEY.
    """
    keep_apart([out], [prompts, examples, checkpoint])
    if (signal is None) != (checkpoint is None):
        raise InputError(
            "--signal and --checkpoint go together: the server's tokens are checked against the "
            "target's tokenizer, and a draft learns with its head"
        )
    if signal is not None and min_words:
        raise InputError("--min-words counts the words of text alone; leave it out with --signal")
    from specdistill.data.filters import Filters
    from specdistill.decoding import Sampling
    from specdistill.engines import openai
    from specdistill.engines.openai_servers import Server

    samplings = [Sampling(t, top_p=top_p) for t in parsing.temperatures(temperature)]
    filters = Filters(min_words, max_repetition, drop_truncated, drop_duplicates, retries)
    choice = answers.choice(best_of, scorer)
    read = answers.read(prompts, split, column, limit, response_column, scorer)
    servers = [Server(url, target, concurrency) for url in base_url]
    asked = answers.put(read, style, examples, shots, seed)
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "samplings": samplings,
        "seed": seed,
        "filters": filters,
        "best_of": choice,
    }
    if signal is not None:
        assert checkpoint is not None
        _ask_top_k(servers, asked, out, signal, checkpoint, how, as_json)
        return
    with console.progress() as progress:
        settled, refused = openai.ask(servers, asked, out, progress=progress, **how)
    removing = filters.remove or choice is not None
    _finish(settled, refused, out, removing=removing, as_json=as_json)


def _ask_top_k(
    servers: Sequence[Server],
    prompts: Sequence[Prompt],
    out: Path,
    signal: str,
    checkpoint: str,
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """As `generate` does, with servers in the place of our engine."""
    from specdistill.data.generation import generate
    from specdistill.data.outside import Outside
    from specdistill.data.signal import kept_tokens
    from specdistill.engines.openai_servers import check_askable
    from specdistill.engines.openai_top_k import TopKAnswers

    if (k := kept_tokens(signal)) is None:
        raise InputError(f"a server tells its most probable tokens: top-k:20; got {signal!r}")
    check_askable(prompts, how["samplings"])
    load = console.loader(checkpoint, "auto", "cpu", decoding=False, head_only=True)
    refused: dict[str, str] = {}

    def decoder(model: LanguageModel, _: int) -> OutsideDecoder:
        return TopKAnswers(servers, model, prompts, k, refused)

    outside = Outside("openai", decoder, {"server_model": servers[0].model})
    with console.progress() as progress:
        store = generate(
            load,
            prompts,
            out,
            signal=signal,
            outside=outside,
            progress=progress,
            note=console.note,
            **how,
        )
    removing = how["filters"].remove or how["best_of"] is not None
    answers.finish(store, removing=removing, as_json=as_json, refused=refused)


def _finish(
    settled: Settled, refused: dict[str, str], out: Path, *, removing: bool, as_json: bool
) -> None:
    """What came of asking a server."""
    answered = [answer for answer in settled.answers if (answer.prompt.response or "").strip()]
    counts = {
        "answers": len(answered),
        "empty": len(settled.answers) - len(answered),
        "cut": sum(not answer.ended for answer in answered),
        "refused": len(refused),
    }
    lines = [f"{len(answered)} answers in {out}, as text"]
    if counts["cut"] or counts["empty"]:
        lines.append(f"{counts['cut']} cut at the limit, {counts['empty']} empty")
    lines += answers.refused_lines(refused)
    if removing:
        lines.append(answers.removed_line(settled.counts))
    if settled.unvaried > 1:
        lines.append(
            f"the server gave {settled.unvaried} prompts the same reply each time: it does "
            "not sample (some do if the checkpoint's generation_config.json has do_sample: true)"
        )
    if apart := sum(answer.reasoning is not None for answer in answered):
        line = f"{apart} answers came with reasoning apart from the text, which a draft learns "
        line += "where its chat template writes 'reasoning_content'"
        lines.append(f"{line}; else serve without a reasoning parser to have it")
    console.print_lines(console.screen_for(as_json), lines)
    answers.refuse_none(answered, out, settled.removed)
    document = {"out": str(out), **counts, "reasoning_apart": apart, **settled.counts}
    console.finish(as_json, document)
