"""What `generate` and `ask` have in common: the prompts as they are put, the choice among answers,
and how removed answers are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdistill.cli import console
from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.data.prompts import Prompt, Turns
    from specdistill.data.scorers import BestOf
    from specdistill.data.token_store import Store


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


def finish(
    store: Store, *, removing: bool, as_json: bool, refused: Mapping[str, str] | None = None
) -> None:
    """What came of answers that are tokens, and whose prompts were `refused`, and why."""
    done, counts, tail = store.done(), store.filtered(), store.tail()
    lines = [f"{len(done)} answers in {store.folder}"]
    if tail:
        # A server tells nothing of the tail but its mass, which bounds what it costs.
        bound = "at most " if (store.manifest.engine or {}).get("name") == "openai" else ""
        lines.append(
            f"outside the kept tokens: {tail['tail_mass']:.3%} of the target's probability; a "
            f"draft that learns what is kept and nothing else loses {bound}"
            f"{tail['alpha_cost']:.4f} of α"
        )
    if removing:
        lines.append(removed_line(counts))
    lines += refused_lines(refused or {})
    console.print_lines(console.screen_for(as_json), lines)
    refuse_none(done, store.folder, counts["removed"])
    best_of = store.manifest.settings.get("best_of")
    document = {
        "out": str(store.folder),
        "answers": len(done),
        **({} if refused is None else {"refused": len(refused)}),
        "parts": len(store.manifest.parts),
        **({"best_of": best_of["number"]} if best_of else {}),
    }
    console.finish(as_json, {**document, **counts, **(tail or {})})


def refused_lines(refused: Mapping[str, str]) -> list[str]:
    if not refused:
        return []
    prompt, reason = next(iter(refused.items()))
    return [
        f"{len(refused)} prompts refused, and asked again by the same command; {prompt!r}: {reason}"
    ]
