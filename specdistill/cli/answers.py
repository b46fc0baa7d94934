"""What `generate` and `ask` have in common: the prompts as they are put, the choice among answers,
and how removed answers are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.data.prompts import Prompt, Turns
    from specdistill.data.scorers import BestOf


def choice(best_of: int | None, scorer: str | None) -> BestOf | None:
    """By which scorer one of several answers is kept."""
    from specdistill.data.scorers import BestOf

    if (best_of is None) != (scorer is None):
        raise InputError(
            "--best-of and --scorer go together: how many answers, and what says which is best"
        )
    return None if best_of is None or scorer is None else BestOf(best_of, scorer)


def read(
    source: str,
    split: str | None,
    column: str | None,
    limit: int | None,
    response_column: str | None,
    scorer: str | None,
    turns: Turns = "last",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Prompt]:
    """The prompts of a source."""
    from specdistill.data.prompts import load_prompts

    if response_column is not None and scorer is None:
        raise InputError(
            "--response-column has no effect without --scorer, which alone reads it; leave it out"
        )
    return load_prompts(
        source,
        split=split,
        column=column,
        response_column=response_column,
        limit=limit,
        turns=turns,
        chat_template_kwargs=chat_template_kwargs,
    )


def put(
    prompts: list[Prompt], style: str, examples: str | None, shots: int | None, seed: int
) -> list[Prompt]:
    """The prompts in their style."""
    from specdistill.data.prompts import load_prompts
    from specdistill.data.styles import styled

    shown = [] if examples is None else load_prompts(examples)
    return styled(prompts, style, examples=shown, shots=shots, seed=seed)


def removed_line(counts: Mapping[str, Any]) -> str:
    return (
        f"removed: {by_kind(counts['removed']) or 'none'}; {counts['regenerated']} prompts "
        f"answered in another way, {counts['dropped']} without an answer"
    )


def refuse_none(answers: Sized, out: Path, removed: Mapping[str, int]) -> None:
    if not len(answers):
        advice = (
            "loosen what removes them, in another folder" if removed else "the line above says why"
        )
        raise InputError(f"no answer is left in {out}; {advice}")


def by_kind(removed: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in removed.items())
