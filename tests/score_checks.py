"""Figures of a score against what they must be by hand, for the tests and for planted bugs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from clocks import clock_of_passes
from scipy import stats

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding.cache import CachedModel
from specdistill.decoding.records import Generation, Output, RowRound
from specdistill.models import LanguageModel
from specdistill.scoring import measure, sampled_texts
from specdistill.scoring.card_rows import PromptRow
from specdistill.scoring.choice import choose
from specdistill.scoring.rows import (
    Timed,
    by_prompt,
    counted,
    row,
    with_costs,
    without_stalls,
)
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.statistics import ratio_of_sums

Cost = Callable[[int, bool, int], float]  # of the n-th pass: by the target?, its tokens


def score_by_clock(
    pair: Sequence[LanguageModel], cost: Cost, prompts: Sequence[EncodedPrompt], **settings: Any
) -> Scorecard:
    """A card by a clock that only the models' passes move."""
    passes = itertools.count()

    def of_pass(cached: CachedModel, tokens: int) -> float:
        return cost(next(passes), cached.model is pair[0], tokens)

    with clock_of_passes(of_pass), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_texts, "distribution_p_value", lambda *_, **__: 0.5)  # slow
        return measure.score(*pair, prompts, **settings)


def check_interval() -> None:
    """With equal tokens and few prompts the log ratio's standard error is that of a mean: the
    sample deviation, over n - 1, by √n, to second order in the spread.
    """
    for count in (3, 5, 8):
        seconds = 1 + 0.02 * stats.norm.ppf((np.arange(count) + 0.5) / count)
        ones = [1.0] * count
        found = ratio_of_sums([ones, ones], [list(seconds), ones], seed=0)
        half = stats.t.isf(0.025, count - 1) * seconds.std(ddof=1) / math.sqrt(count)
        got = math.log(found.high / found.low) / 2
        assert got == pytest.approx(half, rel=0.05), f"{count} prompts: {got:.4f}, not {half:.4f}"


def prompt_runs(num: int) -> Timed:
    """Two rounds of 4 seconds' prefill in all: of `num` proposals and of one, or plain steps."""
    proposed = [num, 1] if num else [0] * 7
    tokens = [num + 1, 2] if num else [1] * 7
    steps = [
        {
            "prefill": 4.0 if not i else 0.0,
            "draft": 0.25 * count,
            "target": 1.0 + 0.1 * count,
            "verify": 0.05,
            "other": 0.02,
        }
        for i, count in enumerate(proposed)
    ]
    rounds = [
        RowRound("p", [1] * t, count, count, count, i == len(proposed) - 1)
        for i, (count, t) in enumerate(zip(proposed, tokens, strict=True))
    ]
    output = Output("p", [1] * sum(tokens), rounds)
    seconds = sum(sum(step.values()) for step in steps) + 0.3
    return Timed(Generation([output], {}, len(steps), sum(proposed), None, steps), seconds)


def prompt_rows() -> tuple[PromptRow, ...]:
    runs, _ = without_stalls({(0.0, 0): [[prompt_runs(0)] * 2], (0.0, 4): [[prompt_runs(4)]]})
    prompts = [EncodedPrompt("p", [1, 2])]
    counts = counted(runs)
    return tuple(by_prompt((0.0, 4), prompts, counts[0.0, 4], counts[0.0, 0]))


def check_row() -> None:
    """Two rounds, of four draft steps and of one: 7 tokens in 5 draft steps and two verify passes,
    against 7 plain steps. The prompt's prefill belongs to neither.
    """
    runs, _ = without_stalls({(0.0, 0): [[prompt_runs(0)] * 2], (0.0, 4): [[prompt_runs(4)]]})
    counts = counted(runs)
    drafted, plain = counts[0.0, 4], counts[0.0, 0]
    draft_passes = runs[0.0, 4][0].draft_passes
    counted_row = row((0.0, 4), drafted, plain, 0.1, 0)
    found = with_costs(counted_row, draft_passes, plain, math.nan)
    assert found.block_efficiency == 3.5
    assert found.cost_ratio == pytest.approx(0.25)
    assert found.verify_ratio == pytest.approx(1.25), "(1.4 + 1.1) / 2"
    assert found.predicted_speedup == pytest.approx(7 / (5 * 0.25 + 2.5))
    (mine,) = prompt_rows()
    assert mine.verifying_seconds == pytest.approx(2.5 + 2 * 0.07 + 0.3)
    assert mine.stepping_seconds == pytest.approx(7 * 1.07 + 0.3)
    assert mine.seconds == pytest.approx(4 + 1.25 + 2.5 + 0.14 + 0.3)
    assert found.speedup == pytest.approx((7 / mine.seconds) / (7 / mine.baseline_seconds))


def check_choice() -> None:
    """Of eight γ worth nothing the best by chance, judged on other prompts, is worth nothing."""
    logs = []
    for trial in range(40):
        noise = np.exp(np.random.default_rng(trial).normal(0, 0.1, (8, 8)))
        rows = [
            PromptRow(f"p{i}", 0.0, gamma, 50, 20, float(seconds), 1.0, 50)
            for gamma, column in enumerate(noise, 1)
            for i, seconds in enumerate(column)
        ]
        logs.append(math.log(choose(rows).speedup.value))
    assert abs(np.mean(logs)) < 0.025, f"{np.mean(logs):.3f} on average, not 0"
