"""Options that mean the same in every command that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from annotated_types import Interval

from specdistill import limits


def among(allowed: Interval, help: str | None = None) -> Any:
    """An option whose number lies within."""
    return typer.Option(min=allowed.ge, max=allowed.le, help=help)  # type: ignore[arg-type]


Target = Annotated[str, typer.Option(help="Hugging Face id, folder, .gguf file, or demo:smollm2.")]
Draft = Annotated[
    str, typer.Option(help="Draft: as the target, or a folder of `init` or `distill`.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on the last line of stdout.")
]
Dtype = Annotated[limits.Dtype, typer.Option(help="auto: by model and device.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, among(limits.THREADS, "CPU threads; default: all physical cores.")]
Split = Annotated[str | None, typer.Option(help="Split of a `datasets` id.")]
Column = Annotated[str | None, typer.Option(help="Column of a `datasets` id.")]
Prompts = Annotated[
    str,
    typer.Option(help=".jsonl, .json, .parquet, .txt, datasets id, demo:train or demo:heldout."),
]
Turns = Annotated[
    Literal["last", "all"],
    typer.Option(
        help="Of a conversation answer the last question, or each after the turns before it."
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="What the chat template is told, as '{\"enable_thinking\": false}', where a line has "
        "none of its own.",
    ),
]
Limit = Annotated[int | None, among(limits.COUNT, "Use only the first so many prompts.")]
LongestAnswer = Annotated[int, among(limits.NEW_TOKENS, "Tokens of the longest answer.")]
BatchSize = Annotated[int, among(limits.ROWS, "Rows decoded together.")]
EnginePython = Annotated[
    Path | None, typer.Option(help="With --engine vllm: the python of vLLM's environment.")
]
TensorParallel = Annotated[
    int | None, among(limits.WORKERS, "With --engine vllm: devices of one engine; 1.")
]
EngineOptions = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="With --engine vllm: more arguments of its `LLM`, such as "
        """'{"quantization": "fp8"}'.""",
    ),
]
Seed = Annotated[int, among(limits.SEED)]

# What both `generate` and `ask` do with prompts and answers.
Answers = Annotated[
    Path, typer.Option(help="Folder of the answers; an unfinished one is continued.")
]
Style = Annotated[
    str, typer.Option(help="How prompts are put: instruction, in-context, chain-of-thought.")
]
Examples = Annotated[
    str | None, typer.Option(help="Prompts with responses, for --style in-context.")
]
Shots = Annotated[
    int | None, among(limits.SHOTS, "Examples shown with each prompt, for --style in-context; 4.")
]
Temperatures = Annotated[
    str, typer.Option(help="0 is greedy; with 0,1 each prompt gets one of the two.")
]
TopP = Annotated[float, typer.Option(help="1 is off.")]
ResponseColumn = Annotated[
    str | None,
    typer.Option(help="Field of the prompts' own answers, for --scorer, if there are several."),
]
MaxRepetition = Annotated[
    float, among(limits.SHARE, "Remove answers with a larger share of repeated 4-grams.")
]
DropTruncated = Annotated[
    bool, typer.Option("--drop-truncated", help="Remove answers cut at --max-new-tokens.")
]
DropDuplicates = Annotated[
    bool, typer.Option("--drop-duplicates", help="Of equal answers keep one.")
]
Retries = Annotated[
    int, among(limits.RETRIES, "Ask again so often, sampling anew, for what was removed.")
]
Best = Annotated[
    int | None, among(limits.ANSWERS, "Of so many answers to a prompt keep one, by --scorer.")
]
Scorer = Annotated[
    str | None,
    typer.Option(help="log-probability, exact-match, majority, or a function, module:function."),
]
