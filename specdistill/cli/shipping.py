"""A draft leaves: `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from specdistill.cli import console
from specdistill.cli.arguments import Json

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


def export(
    draft: Annotated[str, typer.Option(help="Draft folder.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    engine: Annotated[Engine, typer.Option("--for", help="Whose serve command to print.")],
    as_json: Json = False,
) -> None:
    """Write a draft at the target's full vocabulary, as a checkpoint that other engines load."""
    from specdistill import drafts, models

    console.must_be_new(out)
    console.setup(None)
    model = models.load(draft, dtype="auto", device="cpu")
    drafts.save_draft(drafts.widen(model), out)
    serve = SERVE[engine].format(draft=out)
    screen = console.screen_for(as_json)
    screen.print(f"{out}: {model.full_vocab_size:,} output tokens. Serve it with", soft_wrap=True)
    screen.print(serve, soft_wrap=True, markup=False, highlight=False)
    console.finish(as_json, {"out": str(out), "vocab_size": model.full_vocab_size, "serve": serve})
