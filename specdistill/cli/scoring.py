"""What a draft is worth: `score`, `check`, `compare`, `plot`."""

from __future__ import annotations

from dataclasses import asdict
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
    among,
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
    big, small = _load_pair(target, draft, dtype, device)
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
    big, small = _load_pair(target, draft, dtype, device)
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


def _load_pair(
    target: str, draft: str, dtype: limits.Dtype, device: str
) -> tuple[LanguageModel, LanguageModel]:
    """Both models, which fit together."""
    from specdistill import models

    big = models.load(target, dtype=dtype, device=device)
    small = models.load(draft, dtype=dtype, device=device)
    models.check_pair(big, small)
    console.note_models(big, small)
    return big, small
