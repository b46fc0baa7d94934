"""The models and the circumstances of a score."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdistill.data.likeness import fingerprint, read_trained
from specdistill.models import LanguageModel, origin
from specdistill.provenance import device_name, git_commit, versions
from specdistill.scoring.scorecard import OWN_ENGINE, ModelCard, Scorecard

if TYPE_CHECKING:
    from specdistill.data.chat import EncodedPrompt


def model_card(model: LanguageModel) -> ModelCard:
    return ModelCard(
        name=model.name,
        parameters=model.parameters(),
        weight_bytes=model.weight_bytes(),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.vocab_size,
        sha256=model.sha256(),
    )


def cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """The time that a hypervisor gave to others (steal) and all time of the processors so far, in
    ticks; None on systems that do not tell.
    """
    try:
        name, *ticks = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        counts = [int(tick) for tick in ticks[:8]]  # a guest's, which follow, are in user's
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(counts) < 8:
        return None
    return counts[7], sum(counts)


def stolen(before: tuple[int, int] | None) -> float | None:
    """The share of the processors' time that went to others since `before`."""
    now = cpu_times()
    if before is None or now is None:
        return None
    steal, total = (b - a for a, b in zip(before, now, strict=True))
    return steal / total if total > 0 else 0.0


def provenance(
    target: LanguageModel,
    draft: LanguageModel,
    seed: int,
    max_new_tokens: int,
    prompts: Sequence[EncodedPrompt],
) -> dict[str, Any]:
    """Device, threads, dtype, versions, git commit, seed, date, what was decoded, and the run that
    made the draft.
    """
    return {
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "versions": versions(),
        "git": git_commit(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engine": OWN_ENGINE,
        "max_new_tokens": max_new_tokens,
        "prompts_sha256": hashlib.sha256(
            json.dumps([[p.id, p.tokens] for p in prompts]).encode()
        ).hexdigest(),
        "draft_origin": origin(draft),
        "trained_prompts": _trained_prompts(draft, prompts),
    }


def _trained_prompts(
    draft: LanguageModel, prompts: Sequence[EncodedPrompt]
) -> dict[str, Any] | None:
    """How many prompts the draft was trained on, a hash of them, and how many of those scored are
    among them; None where nobody knows.
    """
    known = read_trained(draft.path)
    if not known:
        return None
    texts = [str(draft.tokenizer.decode(p.tokens, skip_special_tokens=True)) for p in prompts]
    return {
        "prompts": len(known),
        "sha256": hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest(),
        "scored": sum(fingerprint(text) in known for text in texts),
    }


def trained_line(card: Scorecard) -> str:
    """What to say of a score on prompts of training; empty where there is nothing."""
    trained = card.provenance.get("trained_prompts") or {}
    if not trained.get("scored"):
        return ""
    return (
        f"{trained['scored']} of {card.rows[0].prompts} prompts were trained on: on new ones the "
        "draft accepts less; score it on others"
    )
