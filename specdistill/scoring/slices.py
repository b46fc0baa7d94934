"""The score by category of prompts, where prompts carry one, and by their length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from math import nan
from typing import Any

from specdistill.scoring.card_rows import CategoryRow, PromptRow
from specdistill.scoring.choice import speedup_of

LEAST_FOR_INTERVAL = 3  # the interval of two spans orders of magnitude


def by_category(per_prompt: Sequence[PromptRow], seed: int) -> list[CategoryRow]:
    """A row for every temperature, γ and category; prompts without a category are left out."""
    return _sliced(per_prompt, lambda row: row.category, str, seed)


def by_prompt_length(per_prompt: Sequence[PromptRow], seed: int) -> list[CategoryRow]:
    """A row for every temperature, γ and band of lengths, each twice as long as the one before."""

    def band(row: PromptRow) -> int | None:
        return None if row.prompt_tokens is None else 1 << (row.prompt_tokens.bit_length() - 1)

    return _sliced(per_prompt, band, lambda first: f"{first:,}–{2 * first - 1:,} tokens", seed)


def stops_paying(per_prompt: Sequence[PromptRow]) -> CategoryRow | None:
    """Of the prompts of one setting, the first band of lengths from which on decoding with the
    draft is slower than without, each band's interval below 1; None where the longest prompts are
    not, or the shortest are, too. Bands of fewer than `LEAST_FOR_INTERVAL` say nothing.
    """
    bands = [b for b in by_prompt_length(per_prompt, 0) if b.prompts >= LEAST_FOR_INTERVAL]
    slower = list(takewhile(lambda band: band.speedup_ci95[1] < 1, reversed(bands)))
    return slower[-1] if 0 < len(slower) < len(bands) else None


def _sliced(
    per_prompt: Sequence[PromptRow],
    key: Callable[[PromptRow], Any],
    name: Callable[[Any], str],
    seed: int,
) -> list[CategoryRow]:
    """By the key, in its order; without one a prompt is in no slice."""
    groups: dict[tuple[float, int, Any], list[PromptRow]] = {}
    for row in per_prompt:
        if (slice_ := key(row)) is not None:
            groups.setdefault((row.temperature, row.num_draft_tokens, slice_), []).append(row)
    return [
        _category_row(name(slice_), temperature, num, rows, seed)
        for (temperature, num, slice_), rows in sorted(groups.items())
    ]


def _category_row(
    category: str, temperature: float, num: int, rows: Sequence[PromptRow], seed: int
) -> CategoryRow:
    tested = sum(row.tested or 0 for row in rows)
    accepted = sum(row.accepted or 0 for row in rows)
    speedup = speedup_of(rows, seed)
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
        speedup_ci95=(speedup.low, speedup.high) if len(rows) >= LEAST_FOR_INTERVAL else (nan, nan),
    )
