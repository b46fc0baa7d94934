"""What a draft is worth: `score`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from specdistill import limits
from specdistill.cli import console, parsing, tables
from specdistill.cli.options import (
    ChatTemplateKwargs,
    Column,
    Device,
    Draft,
    Dtype,
    EnginePython,
    Json,
    Limit,
    LongestAnswer,
    Prompts,
    Seed,
    Split,
    Target,
    Threads,
)
from specdistill.errors import InputError
from specdistill.files import keep_apart

if TYPE_CHECKING:
    from collections.abc import Callable

    from specdistill.decoding.parallel import Way
    from specdistill.models import LanguageModel
    from specdistill.scoring.scorecard import Scorecard


def score(
    target: Target,
    draft: Draft,
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="scorecard.json to write.")],
    num_draft_tokens: Annotated[str, typer.Option(help="γ: 4, 1-8 or 2,4,6.")] = "1-8",
    temperature: Annotated[str, typer.Option(help="0, 1 or 0,1.")] = "0,1",
    max_new_tokens: LongestAnswer = 128,
    limit: Limit = None,
    seed: Seed = 0,
    verification: Annotated[
        Literal["token", "block"], typer.Option(help="Verify proposals singly, or as a whole.")
    ] = "token",
    lenience: Annotated[
        str | None,
        typer.Option(
            help="LOSSY: accept more than the target would, by lin:0.5, sq:0.7 or exp:0.8."
        ),
    ] = None,
    least_reach: Annotated[
        float,
        typer.Option(
            help="Stop drafting once all of a proposal is accepted with less than this chance; γ "
            "is then the most. 0 never stops early.",
        ),
    ] = 0.0,
    drafting: Annotated[
        Literal["auto", "parallel", "autoregressive"],
        typer.Option(help="auto: in parallel where the draft was trained for it."),
    ] = "auto",
    keep_text: Annotated[
        bool, typer.Option(help="Keep one answer in the card, for the picture of its tokens.")
    ] = False,
    engine: Annotated[
        Literal["specdistill", "transformers", "vllm"],
        typer.Option(help="Whose decoding to measure; the others want an exported draft."),
    ] = "specdistill",
    engine_python: EnginePython = None,
    concurrency: Annotated[
        str | None,
        typer.Option(help="With --engine vllm: also measure so many requests at a time: 1,4,16."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing scorecard.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure acceptance and speed of a pair by real speculative decoding; exit code 1 if it is not
    lossless.
    """
    gammas, temperatures = (
        parsing.whole_numbers(num_draft_tokens),
        parsing.temperatures(temperature),
    )
    rule = None if lenience is None else parsing.lenience(lenience)
    at_a_time = [] if concurrency is None else parsing.concurrency(concurrency)
    if at_a_time and engine != "vllm":
        raise InputError(
            f"--concurrency would have no effect with --engine {engine}: it is for --engine vllm"
        )
    told = parsing.chat_template_kwargs(chat_template_kwargs)
    _check_engine(engine, engine_python, device, verification, lenience, least_reach, keep_text)
    if engine == "transformers" and drafting == "parallel":
        raise InputError(
            "--drafting parallel: Transformers has no parallel drafting; leave it out, or score "
            "with --engine specdistill or vllm"
        )
    keep_apart([out], [target, draft, prompts, engine_python])
    console.must_be_free(out, overwrite)
    console.setup(threads)
    from specdistill.data import chat
    from specdistill.data.prompts import load_prompts
    from specdistill.scoring import measure
    from specdistill.scoring.measure import trained_line
    from specdistill.scoring.template_settings import as_trained

    measure.check_lenience(verification, rule, temperatures)
    asked = load_prompts(
        prompts, split=split, column=column, limit=limit, chat_template_kwargs=told
    )
    if engine == "vllm":  # loads its own, and needs the device; of ours it needs facts alone
        dtype, device = console.dtype_of_device(dtype), "cpu"
    big, small = console.load_pair(target, draft, dtype, device)
    _note_drafting(small, engine, drafting, least_reach, gammas)
    encoded = chat.encoded(big.tokenizer, as_trained(asked, small, console.note))
    if copies := len(asked) - len(encoded):
        console.note(
            f"{copies} of {len(asked)} prompts are copies of others, and are left out: "
            f"{len(encoded)} are scored"
        )
    score_pair: Callable[..., Scorecard]
    if engine == "specdistill":
        console.note(measure.cache_size(big, small, encoded, gammas, max_new_tokens).line)
        score_pair = partial(
            measure.score,
            big,
            small,
            mode=verification,
            lenience=rule,
            least_reach=least_reach,
            drafting=drafting,
            keep_text=keep_text,
        )
    elif engine == "transformers":
        from specdistill.engines import transformers

        score_pair = partial(transformers.score, big, small)
    else:
        from specdistill.engines import vllm

        assert engine_python is not None
        pair = vllm.Pair.of(big, small, encoded, max_new_tokens, seed, drafting)
        del big, small  # vLLM loads its own
        score_pair = partial(
            vllm.score, engine_python, pair, threads=threads, concurrency=at_a_time
        )
    with console.progress() as progress:
        card = score_pair(
            encoded,
            num_draft_tokens=gammas,
            temperature=temperatures,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    card.write(out)
    screen = console.screen_for(as_json)
    extra = [*tables.slices_tables(card), *tables.load_tables(card)]
    for table in (tables.rows_table(card), *extra):
        screen.print(table)
    lines = [tables.evidence_line(card), card.verdict.reason, *card.load.lines, trained_line(card)]
    console.print_lines(screen, [line for line in lines if line])
    console.finish(as_json, card.document())
    if card.failures:
        raise typer.Exit(1)


def _check_engine(
    engine: str,
    engine_python: Path | None,
    device: str,
    verification: str,
    lenience: str | None,
    least_reach: float,
    keep_text: bool,
) -> None:
    """Raises `InputError` for options that the engine would not heed."""
    limits.check("--least-reach", least_reach, limits.LEAST_REACH)
    ours = {
        "--verification": verification != "token",
        "--lenience": lenience is not None,
        "--least-reach": least_reach > 0,
        "--keep-text": keep_text,
    }
    if engine != "specdistill" and (given := [name for name, on in ours.items() if on]):
        raise InputError(
            f"--engine {engine} has its own rules and keeps no rounds: leave out "
            f"{' and '.join(given)}"
        )
    if engine == "vllm" and device != "auto":
        raise InputError(
            f"--device {device} has no effect with --engine vllm, which runs on the device it was "
            "built for; leave it out"
        )
    if (engine == "vllm") != (engine_python is not None):
        raise InputError(
            "--engine vllm and --engine-python go together: name the python of an environment that "
            "has vLLM"
        )


def _note_drafting(
    draft: LanguageModel, engine: str, way: Way, least_reach: float, num_draft_tokens: list[int]
) -> None:
    """What a parallel draft's user should know. Raises `InputError` where it cannot draft so."""
    from specdistill.decoding.parallel import Drafting, untrained_places

    if engine == "transformers":
        if draft.mask_token is not None:
            console.note(
                "Transformers has no parallel drafting: this draft takes a pass for every token"
            )
    elif Drafting(way, least_reach).in_parallel(draft) and (
        words := untrained_places(draft, num_draft_tokens)
    ):
        console.note(words)
