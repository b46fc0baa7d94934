"""The command line: the only file that prints or exits. Heavy imports wait for the commands."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from specdistill import __version__, options, tables
from specdistill.errors import InputError, SpecDistillError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from specdistill.decoding import CacheSize
    from specdistill.models import LanguageModel
    from specdistill.progress import Progress

app = typer.Typer(
    name="specdistill",
    help="Make a draft model for your target and your prompts, distil it, and score it by real "
    "speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

Target = Annotated[str, typer.Option(help="Hugging Face id, folder, .gguf file, or demo:smollm2.")]
Draft = Annotated[
    str, typer.Option(help="Draft: as the target, or a folder of `init` or `distill`.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on the last line of stdout.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float64, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: all physical cores.", min=1)
]
Split = Annotated[str | None, typer.Option(help="Split of a `datasets` id.")]
Column = Annotated[str | None, typer.Option(help="Column of a `datasets` id.")]
_AFTER_INTERRUPT = {
    "quickstart": "; the same command goes on where it stopped",
    "generate": "; the same command goes on where it stopped",
    "distill": "; with --resume the same command goes on from the last checkpoint",
}

Engine = Literal["transformers", "vllm", "sglang"]
SERVE: dict[str, str] = {
    "transformers": "target.generate(**inputs, "
    'assistant_model=AutoModelForCausalLM.from_pretrained("{draft}"))',
    "vllm": "vllm serve TARGET --speculative-config "
    '\'{{"method": "draft_model", "model": "{draft}", "num_speculative_tokens": 4}}\'',
    "sglang": "python -m sglang.launch_server --model-path TARGET "
    "--speculative-algorithm STANDALONE --speculative-draft-model-path {draft} "
    "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5",
}


def main() -> None:
    """Run a command; our own errors become one line and exit code 2, an interrupt 130. `--debug`
    shows tracebacks.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would run through ours
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments, standalone_mode=True)
    except SpecDistillError as error:
        if debug:
            raise
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # what typer makes of an interrupt
            raise
        command = next((a for a in arguments if a in _AFTER_INTERRUPT), "")
        _note(f"interrupted{_AFTER_INTERRUPT.get(command, '')}")
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""


@app.command()
def quickstart(
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: a new one under runs/.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """The whole loop on the embedded model: answers, draft, distillation, score, report."""
    from specdistill import pipeline

    _setup(threads)
    folder = run_dir or _new_run(Path("runs"))
    start = time.perf_counter()
    with _progress() as progress:
        before, after = pipeline.quickstart(folder, progress=progress, note=_note)
    out = _tables(as_json)
    out.print(tables.before_after_table(before, after))
    _print_lines(out, [tables.evidence_line(after), after.verdict.reason])
    out.print(
        f"Report: {folder / 'report.html'}, report.md   draft: {folder / 'draft'}   pictures: "
        f"{folder / 'plots'}",
        soft_wrap=True,
    )
    out.print(f"{time.perf_counter() - start:.0f} s in all")
    _finish(
        as_json, {"run_dir": str(folder), "before": before.document(), "after": after.document()}
    )


@app.command()
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
    _must_be_new(out)
    _setup(None)
    model = models.load(target, dtype=dtype, device="cpu")  # type: ignore[arg-type]
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
    screen = _tables(as_json)
    screen.print(table)
    screen.print(f"cost ratio by bytes: {ratio:.3f}")
    if vocabulary is not None:
        screen.print(f"the kept tokens are {vocabulary.coverage:.2%} of the tokens in {vocab_from}")
    _finish(
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


@app.command()
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
    _setup(threads)
    asked = load_prompts(prompts, split=split, column=column, limit=limit)
    model = packing.pack(models.load(target, dtype=dtype, device=device), batch_size)  # type: ignore[arg-type]
    _note_models(model)
    requests = [Request(p.id, encode_prompt(model.tokenizer, p), max_new_tokens) for p in asked]
    _note_cache(SpeculativeDecoder(model, batch_size=batch_size).cache_size(requests))
    if size := generation.signal_bytes(model, len(asked), max_new_tokens, signal):
        _note(f"the signal of {len(asked)} answers takes at most {size:,} bytes in {out}")
    with _progress() as progress:
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
    screen, tail = _tables(as_json), store.tail()
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
    _finish(as_json, {**document, **counts, **(tail or {})})


@app.command()
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
    _setup(threads)
    from specdistill import distill as distillation
    from specdistill import heads, models
    from specdistill.distiller import configured_objective

    configured_objective(settings)  # before the models are read

    read = models.load if settings.signal == "live" else heads.load_head
    target = read(settings.target, dtype=settings.dtype, device=settings.device)
    student = models.load(settings.draft, dtype="float32", device=settings.device)
    models.check_pair(target, student)
    _note_models(target, student, decoding=False)
    with _progress() as progress:
        folder = distillation.distill(settings, target, student, resume=resume, progress=progress)
    last = (folder.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    metrics = json.loads(last)
    _tables(as_json).print(
        f"held-out expected α {metrics['expected_alpha']:.3f}, greedy match "
        f"{metrics['greedy_match']:.3f} after "
        f"{metrics['step']} steps; draft in {folder}",
        soft_wrap=True,
    )
    _finish(as_json, {"draft": str(folder), **metrics})


@app.command()
def score(
    target: Target,
    draft: Draft,
    prompts: Annotated[
        str, typer.Option(help=".jsonl, .txt, datasets id, demo:train or demo:heldout.")
    ],
    out: Annotated[Path, typer.Option(help="scorecard.json to write.")],
    num_draft_tokens: Annotated[str, typer.Option(help="γ: 4, 1-8 or 2,4,6.")] = "1-8",
    temperature: Annotated[str, typer.Option(help="0, 1 or 0,1.")] = "0,1",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many prompts.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    verification: Annotated[
        Literal["token", "block"], typer.Option(help="Verify proposals singly, or as a whole.")
    ] = "token",
    lenience: Annotated[
        str | None,
        typer.Option(
            help="LOSSY: accept more than the target would, by lin:0.5, sq:0.7 or exp:0.8."
        ),
    ] = None,
    keep_text: Annotated[
        bool, typer.Option(help="Keep one answer in the card, for the picture of its tokens.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing scorecard.")] = False,
    split: Split = None,
    column: Column = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure acceptance and speed of a pair by real speculative decoding."""
    gammas, temperatures = (
        options.whole_numbers(num_draft_tokens),
        options.temperatures(temperature),
    )
    rule = None if lenience is None else options.lenience(lenience)
    _must_be_free(out, overwrite)
    _setup(threads)
    from specdistill import models, packing
    from specdistill.data.chat import encode_prompt
    from specdistill.data.prompts import load_prompts
    from specdistill.scoring import measure

    measure.check_lenience(verification, rule, temperatures)
    asked = load_prompts(prompts, split=split, column=column, limit=limit)
    big = models.load(target, dtype=dtype, device=device)  # type: ignore[arg-type]
    small = models.load(draft, dtype=dtype, device=device)  # type: ignore[arg-type]
    models.check_pair(big, small)
    for model in (big, small):
        packing.pack(model, 8)
    _note_models(big, small)
    encoded = [
        measure.EncodedPrompt(p.id, encode_prompt(big.tokenizer, p), p.category) for p in asked
    ]
    _note_cache(measure.cache_size(big, small, encoded, gammas, max_new_tokens))
    with _progress() as progress:
        card = measure.score(
            big,
            small,
            encoded,
            num_draft_tokens=gammas,
            temperatures=temperatures,
            max_new_tokens=max_new_tokens,
            seed=seed,
            mode=verification,
            lenience=rule,
            keep_text=keep_text,
            progress=progress,
        )
    card.write(out)
    screen = _tables(as_json)
    screen.print(tables.rows_table(card))
    _print_lines(screen, [tables.evidence_line(card), card.verdict.reason])
    _finish(as_json, card.document())


@app.command()
def check(
    target: Target,
    draft: Draft,
    prompts: Annotated[
        str | None, typer.Option(help="As for `score`; default: a few that are built in.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=2)] = 32,
    limit: Annotated[int, typer.Option(help="Use only the first so many prompts.")] = 8,
    seed: Annotated[int, typer.Option()] = 0,
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
    _setup(threads)
    from specdistill import models, packing
    from specdistill.data.chat import encode_prompt
    from specdistill.data.prompts import load_prompts
    from specdistill.scoring import check as checks
    from specdistill.scoring.measure import EncodedPrompt

    asked = checks.built_in_prompts(limit)
    if prompts is not None:
        asked = load_prompts(prompts, split=split, column=column, limit=limit)
    big = models.load(target, dtype=dtype, device=device)  # type: ignore[arg-type]
    small = models.load(draft, dtype=dtype, device=device)  # type: ignore[arg-type]
    models.check_pair(big, small)
    for model in (big, small):
        packing.pack(model, 8)
    _note_models(big, small)
    encoded = [EncodedPrompt(p.id, encode_prompt(big.tokenizer, p)) for p in asked]
    pair = checks.Pair(big, small, encoded, max_new_tokens, seed)
    _note_cache(pair.cache_size())
    with _progress() as progress:
        results = checks.run_checks(pair, progress)
    passed = all(result.passed for result in results)
    screen = _tables(as_json)
    screen.print(tables.checks_table(results))
    verdict = "lossless, as far as was checked" if passed else "NOT lossless"
    chance = f"a check that looks at chance fails in fewer than 1 of {1 / checks.FALSE_ALARM:,.0f}"
    _print_lines(screen, [*tables.difference_lines(results), f"{verdict}; {chance} sound runs"])
    _finish(as_json, {"passed": passed, "checks": [asdict(result) for result in results]})
    if not passed:
        raise typer.Exit(1)


@app.command()
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
    from specdistill.scoring.comparable import obstacles, read_cards
    from specdistill.scoring.scorecard import write_json

    if out is not None:
        _must_be_free(out, overwrite)
    named = read_cards(cards)
    screen = _tables(as_json)
    if reasons := obstacles(named):
        lines = ["these scorecards cannot be compared:", *(f"- {reason}" for reason in reasons)]
        _print_lines(screen, lines)
        _finish(as_json, comparison.refusal(reasons))
        raise typer.Exit(1)
    found = comparison.compare(named)
    for table in tables.leaderboard(found):
        screen.print(table)
    _print_lines(screen, [f"{difference.sentence}." for difference in found.differences])
    if out is not None:
        write_json(found.document(), out)
    _finish(as_json, found.document())


@app.command()
def plot(
    sources: Annotated[
        list[Path], typer.Argument(help="A run folder; or several, or scorecards, to compare.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; default: plots/ in a run folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a run folder again, or several drafts in one picture."""
    from specdistill.plots import plot_all, plot_together

    alone = len(sources) == 1 and not sources[0].is_file()
    if not alone and out is None:
        raise InputError("pictures of scorecards or of several runs need --out, a folder for them")
    drawn = plot_together(sources, out) if not alone and out else plot_all(sources[0], out)
    files = [str(file) for file in drawn]
    _tables(as_json).print("\n".join(files), soft_wrap=True)
    _finish(as_json, {"files": files})


@app.command()
def export(
    draft: Annotated[str, typer.Option(help="Draft folder.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    engine: Annotated[Engine, typer.Option("--for", help="Whose serve command to print.")],
    as_json: Json = False,
) -> None:
    """Write a draft at the target's full vocabulary, as a checkpoint that other engines load."""
    from specdistill import drafts, models

    _must_be_new(out)
    _setup(None)
    model = models.load(draft, dtype="auto", device="cpu")
    drafts.save_draft(drafts.widen(model), out)
    serve = SERVE[engine].format(draft=out)
    screen = _tables(as_json)
    screen.print(f"{out}: {model.full_vocab_size:,} output tokens. Serve it with", soft_wrap=True)
    screen.print(serve, soft_wrap=True, markup=False, highlight=False)
    _finish(as_json, {"out": str(out), "vocab_size": model.full_vocab_size, "serve": serve})


def _setup(threads: int | None) -> None:
    """Threads are explicit; transformers' own progress and warnings would drown ours."""
    import torch
    import transformers

    torch.set_num_threads(threads or torch.get_num_threads())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()


def _new_run(parent: Path) -> Path:
    """runs/quickstart, or the first quickstart-2, -3, ... that holds no finished run; an unfinished
    one is continued.
    """
    number = 1
    while (folder := parent / ("quickstart" if number == 1 else f"quickstart-{number}")) and (
        folder / "report.md"
    ).exists():
        number += 1
    return folder


def _must_be_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name another folder or remove it")


def _must_be_free(file: Path, overwrite: bool) -> None:
    """Asked before long work whose result is one file at its end."""
    if file.exists() and not overwrite:
        raise InputError(f"{file} exists; pass --overwrite to replace it, or name another file")
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere a line whenever a stage begins, ends, or ten seconds have
    passed.
    """
    if err.is_terminal:
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
        )
        with Bars(
            *columns, TimeElapsedColumn(), TextColumn("{task.fields[detail]}"), console=err
        ) as bars:
            tasks: dict[str, Any] = {}

            def draw(stage: str, done: float, total: float, detail: str = "") -> None:
                if stage not in tasks or bars.tasks[tasks[stage]].finished:
                    tasks[stage] = bars.add_task(stage, total=total, detail=detail)
                bars.update(tasks[stage], completed=done, total=total, detail=detail)

            yield draw
        return
    shown: dict[str, float] = {}
    begin = time.perf_counter()

    def write(stage: str, done: float, total: float, detail: str = "") -> None:
        now = time.perf_counter()
        if done >= total or now - shown.get(stage, 0) >= 10:
            shown[stage] = now
            line = f"[{now - begin:5.0f} s] {stage} {100 * done / max(total, 1e-9):.0f}% {detail}"
            err.print(line, markup=False, highlight=False, soft_wrap=True)

    yield write


def _note_models(target: LanguageModel, *drafts: LanguageModel, decoding: bool = True) -> None:
    """How the models run; where they decode, what of the target's own settings does not apply."""
    from specdistill.decoding.sampling import unsupported_settings

    for model in (target, *drafts):
        _note(f"{model.name}: {model.dtype} on {model.device}")
    if decoding and (ignored := unsupported_settings(target.model.generation_config)):
        _note(f"{target.name}: its generation config's {', '.join(ignored)} is not applied")


def _note_cache(size: CacheSize) -> None:
    rows = "1 row" if size.rows == 1 else f"{size.rows} rows"
    _note(f"cache: {size.bytes / 1e6:,.1f} MB for {rows} of up to {size.slots:,} tokens")


def _print_lines(screen: Console, lines: list[str]) -> None:
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)


def _note(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def _tables(as_json: bool) -> Console:
    """Where tables go: stdout, or stderr when stdout ends in a JSON document."""
    return err if as_json else Console()


def _finish(as_json: bool, document: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(document))
