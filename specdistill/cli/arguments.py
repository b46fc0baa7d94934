"""Options that mean the same in every command that has them."""

from __future__ import annotations

from typing import Annotated

import typer

from specdistill import options

Target = Annotated[str, typer.Option(help="Hugging Face id, folder, .gguf file, or demo:smollm2.")]
Draft = Annotated[
    str, typer.Option(help="Draft: as the target, or a folder of `init` or `distill`.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on the last line of stdout.")
]
Dtype = Annotated[options.Dtype, typer.Option(help="auto: by model and device.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: all physical cores.", min=1)
]
Split = Annotated[str | None, typer.Option(help="Split of a `datasets` id.")]
Column = Annotated[str | None, typer.Option(help="Column of a `datasets` id.")]
Prompts = Annotated[
    str, typer.Option(help=".jsonl, .txt, datasets id, demo:train or demo:heldout.")
]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many prompts.")]
LongestAnswer = Annotated[int, typer.Option(help="Tokens of the longest answer.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Rows decoded together.", min=1)]
