"""How figures of a scorecard are shown, wherever that is: tables, report, pictures, model card."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from specdistill.data.settings import difference
from specdistill.scoring.card_rows import Row
from specdistill.scoring.scorecard import Scorecard


class Measured(Protocol):
    """Whatever has a speedup: a row, a category's, a place in a comparison."""

    @property
    def speedup(self) -> float: ...

    @property
    def speedup_ci95(self) -> tuple[float, float]: ...


def number(value: float, digits: int) -> str:
    """Fixed digits; a dash for what could not be measured."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


class Drafted(Protocol):
    """Whatever has a γ: a row, a place in a comparison."""

    @property
    def num_draft_tokens(self) -> int: ...

    @property
    def least_reach(self) -> float: ...


def gamma(row: Drafted) -> str:
    """γ, or the most of it where drafting stops early."""
    return f"≤ {row.num_draft_tokens}" if row.least_reach else str(row.num_draft_tokens)


def gamma_is(row: Drafted) -> str:
    """The same in a sentence."""
    return f"γ {gamma(row)} (stops early)" if row.least_reach else f"γ = {gamma(row)}"


def speedup(row: Measured) -> str:
    """With its interval; words where plain decoding was slowed down, so that there is none."""
    if isinstance(row, Row) and row.slowed:
        return "plain slowed"
    low, high = (number(end, 2) for end in row.speedup_ci95)
    return f"{number(row.speedup, 2)} [{low}, {high}]"


def labelled(text: str, card: Scorecard, quoted: Callable[[str], str] = str) -> str:
    """A title with what is unusual about the card; `quoted` makes that safe for where it stands."""
    return f"{text} ({quoted(card.label)})" if card.label else text


def trained_line(card: Scorecard) -> str:
    """What to say of a score on prompts of training, or on prompts that are put otherwise; empty
    where there is nothing.
    """
    trained = card.provenance.get("trained_prompts") or {}
    lines = [settings_line(card)]
    if trained.get("scored"):
        lines.append(
            f"{trained['scored']} of {card.rows[0].prompts} prompts were trained on: on new ones "
            "the draft accepts less; score it on others"
        )
    return "; ".join(filter(None, lines))


def settings_line(card: Scorecard) -> str:
    """What to say where prompts were put otherwise than in training; empty where there is
    nothing.
    """
    origin = card.provenance.get("draft_origin") or {}
    scored = card.provenance.get("chat_template_kwargs") or []
    return difference(scored, origin.get("chat_template_kwargs") or [])
