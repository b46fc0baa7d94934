"""The score by category of prompts, where prompts carry one."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

from specdistill.scoring.scorecard import CategoryRow, PromptRow
from specdistill.scoring.statistics import ratio_of_sums

MIN_PROMPTS = 3  # the interval of two spans orders of magnitude


def by_category(per_prompt: Sequence[PromptRow], seed: int) -> list[CategoryRow]:
    """A row for every temperature, γ and category; prompts without a category are left out."""
    groups: dict[tuple[float, int, str], list[PromptRow]] = {}
    for row in per_prompt:
        if row.category is not None:
            key = (row.temperature, row.num_draft_tokens, row.category)
            groups.setdefault(key, []).append(row)
    return [
        _category_row(category, temperature, num, rows, seed)
        for (temperature, num, category), rows in sorted(groups.items())
    ]


def _category_row(
    category: str, temperature: float, num: int, rows: Sequence[PromptRow], seed: int
) -> CategoryRow:
    tested = sum(row.tested or 0 for row in rows)
    accepted = sum(row.accepted or 0 for row in rows)
    speedup = ratio_of_sums(
        [[row.emitted for row in rows], [row.baseline_seconds for row in rows]],
        [[row.seconds for row in rows], [row.baseline_emitted for row in rows]],
        seed,
    )
    return CategoryRow(
        category=category,
        temperature=temperature,
        num_draft_tokens=num,
        prompts=len(rows),
        tested=tested,
        accepted=accepted,
        acceptance_rate=accepted / tested if tested else nan,
        block_efficiency=sum(row.emitted for row in rows) / sum(row.rounds for row in rows),
        speedup=speedup.value,
        speedup_ci95=(speedup.low, speedup.high) if len(rows) >= MIN_PROMPTS else (nan, nan),
    )
