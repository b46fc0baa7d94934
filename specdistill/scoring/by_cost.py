"""At which cost of a draft step a parallel draft beats an autoregressive one of as many weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from scipy import optimize

from specdistill.scoring.card_rows import with_fixed_gamma
from specdistill.scoring.comparable import Cards, common_temperatures
from specdistill.scoring.scorecard import Scorecard

COSTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of a draft step, in plain steps
HIGHEST = 10.0
Speed = tuple[float, int]  # over plain decoding, and the γ that gives it


@dataclass(frozen=True)
class AtCost:
    """Speed and best γ of both drafts where a draft step costs `cost_ratio` plain steps, and
    verifying is free: τ / (1 + γc) autoregressively, τ / (1 + c) in parallel.
    """

    cost_ratio: float
    autoregressive: Speed
    parallel: Speed


@dataclass(frozen=True)
class ByCost:
    """Two cards at one temperature. The parallel draft is the faster one from `break_even` on: 0
    where it always is, infinite where it never is.
    """

    autoregressive: str
    parallel: str
    temperature: float
    costs: list[AtCost]
    break_even: float

    @property
    def sentence(self) -> str:
        where = f"by its τ at T = {self.temperature:g}, {self.parallel} (parallel)"
        if self.break_even == 0:
            return f"{where} beats {self.autoregressive} at any cost of a draft step"
        if math.isinf(self.break_even):
            return f"{where} beats {self.autoregressive} at no cost of a draft step"
        return (
            f"{where} beats {self.autoregressive} where a draft step costs more than "
            f"{self.break_even:.3f} of a plain step"
        )

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


def by_cost(cards: Cards) -> list[ByCost]:
    """Every pair of a parallel and an autoregressive card whose drafts read as many bytes for a
    step, so that one costs as much as the other, at the temperatures that all cards have.
    """
    parallel = [name for name, card in cards.items() if card.drafting == "parallel"]
    others = [name for name in cards if name not in parallel]
    return [
        _pair(one, other, cards, temperature)
        for temperature in common_temperatures(cards)
        for one, other in product(others, parallel)
        if cards[one].draft.weight_bytes == cards[other].draft.weight_bytes
    ]


def _pair(one: str, other: str, cards: Cards, temperature: float) -> ByCost:
    def gain(cost: float) -> float:
        ahead, behind = (_speed(cards[name], temperature, cost)[0] for name in (other, one))
        return ahead - behind

    # Of the same weights, the parallel draft gains on the other wherever a step costs more.
    break_even = 0.0 if gain(0) > 0 else math.inf
    if gain(0) <= 0 < gain(HIGHEST):
        break_even = float(optimize.brentq(gain, 0, HIGHEST))
    costs = [
        AtCost(cost, *(_speed(cards[name], temperature, cost) for name in (one, other)))
        for cost in COSTS
    ]
    return ByCost(one, other, temperature, costs, break_even)


def _speed(card: Scorecard, temperature: float, cost: float) -> Speed:
    """The best of the γ that were measured."""
    rows = with_fixed_gamma([row for row in card.rows if row.temperature == temperature])
    return max(
        (row.block_efficiency / (1 + cost * row.draft_steps), row.num_draft_tokens) for row in rows
    )
