"""Intervals and planning curves; the statistics themselves are scipy's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats


def speedup_interval(
    emitted: Sequence[int],
    seconds: Sequence[float],
    plain_emitted: Sequence[int],
    plain_seconds: Sequence[float],
    seed: int,
) -> tuple[float, float]:
    """95% interval of the ratio of tokens per second, by a bootstrap that resamples prompts, each
    with both its runs. (nan, nan) for a single prompt: nothing can be said.
    """
    if len(emitted) < 2:
        return float("nan"), float("nan")

    def ratio(e, s, pe, ps, axis=-1):  # type: ignore[no-untyped-def]
        return (e.sum(axis) / s.sum(axis)) / (pe.sum(axis) / ps.sum(axis))

    data = [
        np.asarray(column, dtype=float)
        for column in (emitted, seconds, plain_emitted, plain_seconds)
    ]
    interval = stats.bootstrap(
        data,
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def martingale_p_value(deviation: float, variance: float) -> float:
    """Bound on the chance that a sum of steps of at most 1, each of mean 0 given those before it,
    ends at least `deviation` from 0, where the steps' conditional variances add up to `variance`:
    2 exp(-d² / 2 (variance + d/3)), Freedman (1975). Holds for any number of steps.
    """
    if deviation <= 0:
        return 1.0
    return min(1.0, 2 * math.exp(-(deviation**2) / (2 * (variance + deviation / 3))))


def planned_speedup(alpha: float, num_draft_tokens: int, cost_ratio: float) -> float:
    """(1 − α^{γ+1}) / ((1 − α)(γc + 1)), Theorem 3.8 of 2211.17192: independent acceptance and a
    free verify pass.
    """
    return planned_tokens(alpha, num_draft_tokens) / (num_draft_tokens * cost_ratio + 1)


def planned_tokens(alpha: float, num_draft_tokens: int) -> float:
    """Expected tokens a round, Σ_{i=0..γ} αⁱ, if every proposal is accepted independently with
    probability α.
    """
    return sum(alpha**i for i in range(num_draft_tokens + 1))


def break_even(num_draft_tokens: int, cost_ratio: float, verify_ratio: float) -> float:
    """The α at which a round costs what its tokens would cost plainly: Σ αⁱ = γc + v. 0 where any α
    pays, 1 where none does (the round then costs at least γ + 1 plain steps).
    """
    cost = num_draft_tokens * cost_ratio + verify_ratio
    if cost <= 1:
        return 0.0
    if cost >= num_draft_tokens + 1:
        return 1.0
    return float(optimize.brentq(lambda a: planned_tokens(a, num_draft_tokens) - cost, 0.0, 1.0))
