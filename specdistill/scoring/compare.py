"""Which draft is faster: scorecards ranked by measured speed, with an interval for every
difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from specdistill.errors import InputError
from specdistill.scoring.by_cost import ByCost, by_cost
from specdistill.scoring.card_rows import Row
from specdistill.scoring.choice import choose, speed_columns
from specdistill.scoring.comparable import Cards, common_temperatures, obstacles, remarks
from specdistill.scoring.scorecard import Scorecard, nullable
from specdistill.scoring.statistics import prompts_needed, ratio_of_sums
from specdistill.scoring.verdict import prompts as count_of

SCHEMA = "specdistill.comparison/1"


@dataclass(frozen=True)
class Standing:
    """A card's fastest setting at one temperature."""

    card: str
    draft: str
    draft_sha256: str
    temperature: float
    num_draft_tokens: int
    prompts: int
    acceptance_rate: float
    block_efficiency: float
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    speedup_ci95: tuple[float, float]
    label: str
    least_reach: float = 0.0


@dataclass(frozen=True)
class Difference:
    """The speedup of `faster` over that of `slower`, each at its fastest γ. The measured ratio is
    at least 1; `shown` tells whether its whole 95% interval is above 1, and `prompts_needed` how
    many would probably show it where it is not (NaN where that cannot be said).
    """

    faster: str
    slower: str
    temperature: float
    ratio: float
    ratio_ci95: tuple[float, float]
    prompts: int
    shown: bool
    prompts_needed: float

    @property
    def sentence(self) -> str:
        where = f"T = {self.temperature:g}, {count_of(self.prompts)}"
        if math.isnan(self.ratio_ci95[0]):
            return (
                f"Between {self.faster} and {self.slower} no difference can be shown ({where}): "
                "an interval needs at least two"
            )
        low, high = map(_percent, self.ratio_ci95)
        more = _percent(self.ratio)
        if self.shown:
            return f"{self.faster} is faster than {self.slower} by {more} [{low}, {high}] ({where})"
        needed = (
            f"about {_two_digits(self.prompts_needed)} would be needed"
            if math.isfinite(self.prompts_needed)
            else "they are equally fast, which no number of prompts would change"
        )
        return (
            f"Between {self.faster} and {self.slower} no difference can be shown with "
            f"{count_of(self.prompts)} (T = {self.temperature:g}: {more} [{low}, {high}]); {needed}"
        )


@dataclass(frozen=True)
class Comparison:
    """`standings` by temperature, and within each the fastest first. `remarks` are what else the
    cards differ in. `by_cost` sets parallel drafts against autoregressive ones of the same weights.
    """

    standings: list[Standing]
    differences: list[Difference]
    remarks: list[str] = field(default_factory=list)
    by_cost: list[ByCost] = field(default_factory=list)

    def from_best(self) -> list[Difference]:
        """Those that the fastest card of a temperature is part of."""
        best: dict[float, str] = {}
        for standing in self.standings:
            best.setdefault(standing.temperature, standing.card)
        return [each for each in self.differences if each.faster == best[each.temperature]]

    def document(self) -> dict[str, Any]:
        """As JSON can hold it: what cannot be said is null."""
        differences = [{**asdict(each), "sentence": each.sentence} for each in self.differences]
        raw = {"schema": SCHEMA, "comparable": True, **asdict(self), "differences": differences}
        return dict(nullable(raw | {"by_cost": [pair.document() for pair in self.by_cost]}))


def refusal(reasons: Sequence[str]) -> dict[str, Any]:
    """The document in place of a comparison that cannot be made."""
    return {"schema": SCHEMA, "comparable": False, "reasons": list(reasons)}


class Incomparable(InputError):
    """Scorecards of which nothing can be said together, for these `reasons`."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("these scorecards cannot be compared: " + "; ".join(reasons))
        self.reasons = list(reasons)


def compare(cards: Cards, seed: int = 0) -> Comparison:
    """Rank the cards at every temperature that all have, each by its fastest γ, at what that is
    worth on prompts that had no say in choosing it.

    Speed is the speedup over plain decoding that was measured in turns with it: the plain decoding
    of comparable cards is the same work, so this is the ratio of tokens per second with the
    machine's drift between the scorings taken out. Differences are bootstrapped over prompts, each
    resampled with all four of its runs. Raises `Incomparable` where there are `obstacles`.
    """
    if reasons := obstacles(cards):
        raise Incomparable(reasons)
    standings: list[Standing] = []
    differences: list[Difference] = []
    for temperature in common_temperatures(cards):
        best = {name: card.best_row(temperature) for name, card in cards.items()}
        ranked = sorted(best, key=lambda name: best[name].speedup, reverse=True)
        standings += [_standing(name, cards[name], best[name]) for name in ranked]
        differences += [
            _difference(faster, slower, cards, best, seed)
            for faster, slower in combinations(ranked, 2)
        ]
    return Comparison(standings, differences, remarks(cards), by_cost(cards))


def _standing(name: str, card: Scorecard, row: Row) -> Standing:
    plain = {base.temperature: base.tokens_per_second for base in card.baseline}
    return Standing(
        card=name,
        draft=card.draft.name,
        draft_sha256=card.draft.sha256,
        temperature=row.temperature,
        num_draft_tokens=row.num_draft_tokens,
        prompts=row.prompts,
        acceptance_rate=row.acceptance_rate,
        block_efficiency=row.block_efficiency,
        tokens_per_second=row.tokens_per_second,
        plain_tokens_per_second=plain[row.temperature],
        speedup=row.speedup,
        speedup_ci95=row.speedup_ci95,
        label=card.label,
        least_reach=row.least_reach,
    )


def _difference(
    faster: str, slower: str, cards: Cards, best: Mapping[str, Row], seed: int
) -> Difference:
    temperature = best[faster].temperature
    chosen = {
        name: choose([p for p in cards[name].per_prompt if p.temperature == temperature])
        for name in (faster, slower)
    }
    fast, slow = ({row.prompt_id: row for row in chosen[name].rows} for name in (faster, slower))
    if fast.keys() != slow.keys():
        raise Incomparable(
            [f"{faster} and {slower} name the same prompts differently; score one of them again"]
        )
    ahead, behind = speed_columns([*fast.values()]), speed_columns([slow[id_] for id_ in fast])
    ratio = ratio_of_sums(
        [*ahead[0], *behind[1]],
        [*behind[0], *ahead[1]],
        seed,
        max(each.wider for each in chosen.values()),
    )
    count, shown = len(fast), ratio.low > 1
    needed = count if shown else prompts_needed(ratio, count)
    return Difference(
        faster, slower, temperature, ratio.value, (ratio.low, ratio.high), count, shown, needed
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f}%"


def _two_digits(count: float) -> str:
    return f"{float(f'{count:.1e}'):,.0f}" if count >= 100 else f"{math.ceil(count)}"
