"""Intervals and planning curves; the statistics themselves are scipy's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats


class Ratio(NamedTuple):
    """A measured ratio with its 95% interval, (nan, nan) where nothing can be said."""

    value: float
    low: float
    high: float


Columns = tuple[list[Sequence[float]], list[Sequence[float]]]  # over, and under, of a ratio


def ratio_of_sums(
    over: Sequence[Sequence[float]],
    under: Sequence[Sequence[float]],
    seed: int,
    wider: float = 1.0,
) -> Ratio:
    """Π (Σ over / Σ under), each a column [n] with an entry per prompt, and its interval by a
    paired bootstrap: prompts are resampled, each with all that was measured of it. Columns that are
    equal cancel exactly where they stand at the same place in both.

    The bootstrap gives the standard error of the log ratio, and Student's t with n - 1 degrees of
    freedom the interval (Hesterberg 2014, 1411.5279): percentiles of the bootstrap cannot go beyond
    what was seen, and with five prompts cover the truth only about 82% of the time, with two 49%.
    (nan, nan) for a single prompt: nothing can be said; and no ratio either where a column holds no
    positive sum. `wider` widens the interval, on the scale of logarithms.
    """
    columns = [np.asarray(column, dtype=float) for column in (*over, *under)]
    num_prompts = len(columns[0])
    sums = [column.sum() for column in columns]
    if not all(0 < total < math.inf for total in sums):
        return Ratio(math.nan, math.nan, math.nan)

    def log_ratio(*resampled, axis=-1):  # type: ignore[no-untyped-def]
        with np.errstate(divide="ignore", invalid="ignore"):  # an entry of 0 leaves no interval
            logs = [np.log(column.sum(axis)) for column in resampled]
            pairs = zip(logs[: len(over)], logs[len(over) :], strict=True)
            return sum(above - below for above, below in pairs)

    value = float(log_ratio(*columns))
    if num_prompts < 2:
        return Ratio(math.exp(value), math.nan, math.nan)
    error = stats.bootstrap(
        columns,
        log_ratio,
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).standard_error
    # Resampled spread is that of n, not n - 1, prompts.
    error *= math.sqrt(num_prompts / (num_prompts - 1))
    half = wider * stats.t.isf(0.025, num_prompts - 1) * error
    return Ratio(*(float(np.exp(end)) for end in (value, value - half, value + half)))


def speedup_interval(
    emitted: Sequence[float],
    seconds: Sequence[float],
    plain_emitted: Sequence[float],
    plain_seconds: Sequence[float],
    seed: int,
) -> tuple[float, float]:
    """95% interval of the ratio of tokens per second, by `ratio_of_sums`."""
    return ratio_of_sums([emitted, plain_seconds], [plain_emitted, seconds], seed)[1:]


def prompts_needed(ratio: Ratio, num_prompts: int) -> float:
    """How many prompts, more than the `num_prompts` that were measured, would show four times out
    of five a ratio as large: the least m with (t of 97.5% + t of 80%, of m − 1 degrees of freedom)
    · standard error · √(n / m) ≤ log ratio, the error being the logarithm's, from the interval.
    Infinite for a ratio of 1, to a millionth; NaN without an interval.
    """
    effect = math.log(ratio.value)
    if abs(effect) < 1e-6 or math.isnan(ratio.low):
        return math.nan if math.isnan(ratio.low) else math.inf
    error = math.log(ratio.high / ratio.low) / (2 * stats.t.isf(0.025, num_prompts - 1))
    spread = num_prompts * (error / effect) ** 2
    normal = stats.norm.isf(0.025) + stats.norm.isf(0.2)
    needed = max(num_prompts + 1, math.ceil(spread * normal**2))  # Student's t asks for a few more
    while needed < spread * sum(stats.t.isf((0.025, 0.2), needed - 1)) ** 2:
        needed += 1
    return float(needed)


def martingale_p_value(deviation: float, variance: float) -> float:
    """Bound on the chance that a sum of steps of at most 1, each of mean 0 given those before it,
    ends at least `deviation` from 0, where the steps' conditional variances add up to `variance`:
    2 exp(-d² / 2 (variance + d/3)), Freedman (1975). Holds for any number of steps.
    """
    if deviation <= 0:
        return 1.0
    return min(1.0, 2 * math.exp(-(deviation**2) / (2 * (variance + deviation / 3))))


def planned_speedup(
    alpha: float, num_draft_tokens: int, cost_ratio: float, draft_steps: float | None = None
) -> float:
    """(1 − α^{γ+1}) / ((1 − α)(γc + 1)), Theorem 3.8 of 2211.17192: independent acceptance and a
    free verify pass. A round takes γ draft steps, or `draft_steps`.
    """
    steps = num_draft_tokens if draft_steps is None else draft_steps
    return planned_tokens(alpha, num_draft_tokens) / (steps * cost_ratio + 1)


def planned_tokens(alpha: float, num_draft_tokens: int) -> float:
    """Expected tokens a round, Σ_{i=0..γ} αⁱ, if every proposal is accepted independently with
    probability α.
    """
    return sum(alpha**i for i in range(num_draft_tokens + 1))


def acceptance_for(tokens: float, num_draft_tokens: int) -> float:
    """The α of which `planned_tokens` makes `tokens`: 0 where that is 1 or fewer, 1 where even full
    acceptance gives no more.
    """
    if math.isnan(tokens):
        return math.nan
    if tokens <= 1:
        return 0.0
    if tokens >= num_draft_tokens + 1:
        return 1.0
    return float(optimize.brentq(lambda a: planned_tokens(a, num_draft_tokens) - tokens, 0.0, 1.0))


def break_even(alpha: float, num_draft_tokens: int, speedup: float) -> float:
    """The α at which this machine and pair would be as fast as plain decoding: planned tokens a
    round fewer by the factor of the measured speedup. All that a round costs is in it, overhead
    too, and α is above it exactly where the speedup is above 1.
    """
    return acceptance_for(planned_tokens(alpha, num_draft_tokens) / speedup, num_draft_tokens)
