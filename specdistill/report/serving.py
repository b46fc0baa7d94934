"""How to serve the draft: commands to copy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from specdistill.drafts.serve_commands import (
    IN_PARALLEL,
    NAMES,
    Engine,
    command,
    fenced,
    name_elsewhere,
    vllm_command,
)
from specdistill.quoting import block, code
from specdistill.scoring.card_rows import Row
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.served import Served

PROGRAMS: tuple[Engine, ...] = ("transformers", "vllm")


def serving(card: Scorecard, best: Row, target: str, folder: Path) -> str:
    """The section with the commands for this draft, in our engine and in others."""
    draft = str(folder) if folder.is_dir() else card.draft.name
    trimmed = card.draft.vocab_size < card.target.vocab_size
    gamma = str(best.num_draft_tokens)
    config = card.provenance.get("speculative_config")  # of what else proposes, in vLLM
    score = ["specdistill", "score", "--target", target]
    score += ["--draft", draft] if config is None else ["--speculative-config", json.dumps(config)]
    score += ["--prompts", "PROMPTS.jsonl", "--out", "CARD.json", "--num-draft-tokens", gamma]
    if config is not None:
        score += ["--engine", "vllm", "--engine-python", "PYTHON"]
    if card.verification.mode != "token":
        score += ["--verification", card.verification.mode]
    if card.verification.lenience:
        score += ["--temperature", f"{best.temperature:g}"]
        score += ["--lenience", card.verification.lenience]
    if card.provenance.get("mask_token") is not None:
        score += ["--drafting", card.drafting]
    if best.least_reach:
        score += ["--least-reach", f"{best.least_reach:g}"]
    parts = ["## How to serve the draft", "Score it on prompts of your own:", _shell(*score)]
    if best.least_reach:
        parts.append(
            f"Other programs propose the same number of tokens in every round, {card.fixed_gamma} "
            "below, and do not stop early."
        )
    outside = name_elsewhere(target)
    if outside != target:
        parts.append(
            f"Other programs do not know the name {code(target)}; below, {code(outside)} stands "
            "for it. Where that has other weights (not quantised, say), the output is what the "
            "target served would say by itself, while acceptance and speed need scoring again."
        )
    if trimmed:
        parts.append(
            f"This draft's vocabulary is trimmed to {card.draft.vocab_size:,} of "
            f"{card.target.vocab_size:,} tokens. Other engines need it at full vocabulary: write "
            "it so with `specdistill export` first."
        )
    mask = card.provenance.get("mask_token")
    if mask is not None:
        parts.append(
            "vLLM and TensorRT-LLM draft in parallel with it, one pass a round. Transformers and "
            "SGLang take a pass for every proposed token. `specdistill export` writes the "
            "checkpoint that they load, in which its mask token is never proposed."
        )
    programs: tuple[Engine, ...] = PROGRAMS if config is None else ("vllm",)
    for engine in programs:
        parts.append(f"With {NAMES[engine]}:")
        exported = f"{draft}-{engine}" if trimmed or mask is not None else draft
        if exported != draft:
            export = ["specdistill", "export", "--draft", draft, "--out", exported]
            parts.append(_shell(*export, "--for", engine))
        masked = mask if engine in IN_PARALLEL else None
        served, dtype = Served.of(card), card.target.dtype
        if config is None:
            text = command(engine, outside, exported, card.fixed_gamma, dtype, masked, served)
        else:
            text = vllm_command(outside, config, card.fixed_gamma, served)
        parts.append(fenced(engine, text))
    return "\n\n".join(parts)


def _shell(*words: str) -> str:
    return block(shlex.join(words), "sh")
