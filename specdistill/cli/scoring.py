"""What a draft is worth: `score`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdistill import limits
from specdistill.cli import console, parsing, tables
from specdistill.cli.at_server import ALL_GAMMAS, AtServer
from specdistill.cli.options import (
    ChatTemplateKwargs,
    Column,
    Device,
    Dtype,
    EngineOptions,
    EnginePython,
    Json,
    Limit,
    LongestAnswer,
    Prompts,
    Seed,
    Split,
    Target,
    TensorParallel,
    Threads,
    Turns,
)
from specdistill.cli.scoring_by_vllm import ByVllm, Runners, serve_lines
from specdistill.errors import InputError
from specdistill.files import keep_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from specdistill.data.chat import EncodedPrompt
    from specdistill.data.prompts import Prompt
    from specdistill.decoding.parallel import Way
    from specdistill.scoring.scorecard import Scorecard

EngineName = Literal["specdistill", "transformers", "vllm"]

Out = Annotated[Path, typer.Option(help="scorecard.json to write.")]
ScoredDraft = Annotated[
    str | None,
    typer.Option(help="Draft: as the target, or a folder of `init` or `distill`."),
]
NumDraftTokens = Annotated[str, typer.Option(help="γ: 4, 1-8 or 2,4,6.")]
Temperatures = Annotated[str, typer.Option(help="0, 1 or 0,1.")]
Verification = Annotated[
    Literal["token", "block"], typer.Option(help="Verify proposals singly, or as a whole.")
]
Lenience = Annotated[
    str | None,
    typer.Option(help="LOSSY: accept more than the target would, by lin:0.5, sq:0.7 or exp:0.8."),
]
LeastReach = Annotated[
    float,
    typer.Option(
        help="Stop drafting once all of a proposal is accepted with less than this chance; γ "
        "is then the most. 0 never stops early.",
    ),
]
DraftingWay = Annotated[
    Literal["auto", "parallel", "autoregressive"],
    typer.Option(help="auto: in parallel where the draft was trained for it."),
]
KeepText = Annotated[
    bool, typer.Option(help="Keep one answer in the card, for the picture of its tokens.")
]
EngineOption = Annotated[
    EngineName,
    typer.Option(help="Whose decoding to measure; the others want an exported draft."),
]
Concurrency = Annotated[
    str | None,
    typer.Option(help="With --engine vllm: also measure so many requests at a time: 1,4,16."),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        help="With --engine vllm, instead of --engine-python: a vLLM server that drafts, such as "
        "http://localhost:8000/v1. The key comes from OPENAI_API_KEY."
    ),
]
PlainBaseUrl = Annotated[
    str | None,
    typer.Option(
        help="A vLLM server of the target alone, to take turns with that of --base-url; without "
        "one no speedup is told."
    ),
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="With --engine vllm, instead of --draft: what else proposes, in vLLM's words, as "
        """'{"method": "ngram", "prompt_lookup_max": 4}'.""",
    ),
]
Runner = Annotated[
    Runners,
    typer.Option(help="With --engine vllm: measure by both of its model runners, V1 and V2."),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing scorecard.")]


def score(
    target: Target,
    prompts: Prompts,
    out: Out,
    draft: ScoredDraft = None,
    num_draft_tokens: NumDraftTokens = ALL_GAMMAS,
    temperature: Temperatures = "0,1",
    max_new_tokens: LongestAnswer = 128,
    limit: Limit = None,
    turns: Turns = "last",
    seed: Seed = 0,
    verification: Verification = "token",
    lenience: Lenience = None,
    least_reach: LeastReach = 0.0,
    drafting: DraftingWay = "auto",
    keep_text: KeepText = False,
    engine: EngineOption = "specdistill",
    engine_python: EnginePython = None,
    tensor_parallel: TensorParallel = None,
    engine_options: EngineOptions = None,
    base_url: BaseUrl = None,
    plain_base_url: PlainBaseUrl = None,
    concurrency: Concurrency = None,
    speculative_config: SpeculativeConfig = None,
    runner: Runner = "auto",
    overwrite: Overwrite = False,
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
    kwargs = parsing.chat_template_kwargs(chat_template_kwargs)
    limits.check("--least-reach", least_reach, limits.LEAST_REACH)
    ours = {
        "--verification": verification != "token",
        "--lenience": lenience is not None,
        "--least-reach": least_reach > 0,
        "--keep-text": keep_text,
    }
    _check_engine(engine, [name for name, given in ours.items() if given], drafting)
    at_server = AtServer(base_url, plain_base_url)
    deployed = engine_python, at_server, tensor_parallel, engine_options
    by_vllm = ByVllm(*deployed, concurrency, speculative_config, runner)
    by_vllm.check(engine, device, draft, drafting, num_draft_tokens, threads)
    keep_apart([out], [each for each in (target, draft, prompts, engine_python) if each])
    console.must_be_free(out, overwrite)
    console.setup(threads)
    from specdistill.data.prompts import load_prompts
    from specdistill.scoring import measure

    measure.check_lenience(verification, rule, temperatures)
    asked = load_prompts(
        prompts, split=split, column=column, limit=limit, turns=turns, chat_template_kwargs=kwargs
    )
    if engine == "vllm":
        encoded, score_pair = by_vllm.prepared(
            target, draft, asked, dtype, drafting, gammas, max_new_tokens, seed, threads
        )
    else:
        assert draft is not None
        how = {
            "mode": verification,
            "lenience": rule,
            "least_reach": least_reach,
            "drafting": drafting,
            "keep_text": keep_text,
        }
        encoded, score_pair = _in_this_process(
            target, draft, asked, dtype, device, engine, gammas, max_new_tokens, how
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
    _show(card, target, draft, as_json)
    if card.failures:
        raise typer.Exit(1)


def _in_this_process(
    target: str,
    draft: str,
    asked: Sequence[Prompt],
    dtype: limits.Dtype,
    device: str,
    engine: EngineName,
    num_draft_tokens: list[int],
    max_new_tokens: int,
    how: dict[str, Any],
) -> tuple[Sequence[EncodedPrompt], Callable[..., Scorecard]]:
    """The prompts as tokens, and the score of them by our engine, as `how` says, or by
    Transformers.
    """
    big, small = console.load_pair(target, draft, dtype, device)
    if engine == "transformers":
        from specdistill.engines import transformers

        if small.mask_token is not None:
            console.note(
                "Transformers has no parallel drafting: this draft takes a pass for every token"
            )
        return console.encoded(big, asked, small), partial(transformers.score, big, small)
    from specdistill.scoring import lossless, measure

    console.note_drafting(small, how["drafting"], num_draft_tokens, how["least_reach"])
    encoded = console.encoded(big, asked, small)
    size = measure.cache_size(big, small, encoded, num_draft_tokens, max_new_tokens)
    console.note(size.line)
    tokens, lossy = [(p.id, p.tokens) for p in encoded], how["lenience"] is not None
    most = lossless.evidence_bytes(big, small, tokens, max(num_draft_tokens), lossy)
    console.note(f"memory: about {most / 1e6:,.1f} MB for the evidence at the end")
    return encoded, partial(measure.score, big, small, **how)


def _show(card: Scorecard, target: str, draft: str | None, as_json: bool) -> None:
    from specdistill.scoring.headline import trained_line

    screen = console.screen_for(as_json)
    extra = [*tables.slices_tables(card), *tables.load_tables(card)]
    for table in (tables.rows_table(card), *extra):
        screen.print(table)
    lines = [
        tables.evidence_line(card),
        card.verdict.reason,
        *card.load.lines,
        trained_line(card),
    ]
    if card.provenance.get("engine") == "vllm" and "servers" not in card.provenance:
        lines += serve_lines(card, target, draft)
    console.print_lines(screen, [line for line in lines if line])
    console.finish(as_json, card.document())


def _check_engine(engine: EngineName, ours: Sequence[str], drafting: Way) -> None:
    """Raises `InputError` for options that the engine would not heed: of these `ours` are given."""
    if engine != "specdistill" and ours:
        raise InputError(
            f"--engine {engine} has its own rules and keeps no rounds: leave out "
            f"{' and '.join(ours)}"
        )
    if engine == "transformers" and drafting == "parallel":
        raise InputError(
            "--drafting parallel: Transformers has no parallel drafting; leave it out, or score "
            "with --engine specdistill or vllm"
        )
