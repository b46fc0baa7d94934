"""Which setting is the fastest, and what it is worth on prompts that had no say in choosing it.

The best of many settings is better than it should be: its luck is chosen with it, and a draft worth
exactly nothing would seem to pay in about a sixth of all scores. So each half of the prompts is
judged at the setting that was the fastest on the other half, and the halves are put together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from specdistill.errors import InputError
from specdistill.scoring.statistics import Columns, Ratio, ratio_of_sums

if TYPE_CHECKING:
    from specdistill.scoring.card_rows import PromptRow, Row

Setting = tuple[float, int]  # temperature and γ, which is 0 for plain decoding

# Either half judges what the other chose, so their errors go together: with K settings worth the
# same, independent and normal, by (expected largest of K)² / (K - 1), at most 0.36, at K = 3.
SHARED_ERROR = 0.36
WIDER = math.sqrt(1 + SHARED_ERROR)


class Choice(NamedTuple):
    """`setting` is the fastest on all prompts together. `rows` has each prompt at the setting that
    was the fastest on the other half, and `speedup` is theirs, with its interval. The halves count
    `chosen_on` and `judged_on` prompts, both 0 where there was nothing to choose.
    """

    setting: Setting
    speedup: Ratio
    rows: list[PromptRow]
    chosen_on: int
    judged_on: int

    @property
    def wider(self) -> float:
        """What an interval over `rows` has to be widened by."""
        return WIDER if self.chosen_on else 1.0

    @property
    def words(self) -> str:
        return chosen(self.chosen_on, self.judged_on)


def choose(per_prompt: Sequence[PromptRow]) -> Choice:
    """Of the settings of `per_prompt`, by the prompts that were decoded in all of them. The halves
    are by the hash of the prompts' ids, so that the card alone decides, and not the prompts' order.
    Raises `InputError` where no prompt was decoded in all.
    """
    settings: dict[Setting, dict[str, PromptRow]] = {}
    for row in per_prompt:
        settings.setdefault((row.temperature, row.num_draft_tokens), {})[row.prompt_id] = row
    shared = set.intersection(*(set(rows) for rows in settings.values())) if settings else set()
    ids = [id_ for id_ in dict.fromkeys(row.prompt_id for row in per_prompt) if id_ in shared]
    if not ids:
        raise InputError("no prompt was decoded in every setting; score the draft again")
    fastest = _fastest(settings, ids)
    if len(settings) == 1 or len(ids) == 1:
        rows, halves = [settings[fastest][id_] for id_ in ids], (0, 0)
    else:
        hashed = sorted(ids, key=lambda id_: sha256(id_.encode()).digest())
        one, other = set(hashed[: len(ids) // 2]), set(hashed[len(ids) // 2 :])
        judge = {True: _fastest(settings, other), False: _fastest(settings, one)}
        rows = [settings[judge[id_ in one]][id_] for id_ in ids]
        halves = (len(one), len(other))
    speedup = speedup_of(rows, wider=WIDER if halves[0] else 1.0)
    return Choice(fastest, speedup, rows, *halves)


def judged(row: Row, per_prompt: Sequence[PromptRow]) -> Row:
    """The fastest row with the speedup that `choose` finds for the settings of `per_prompt`, if it
    is among them; NaN where it was slowed.
    """
    if row.slowed:
        return replace(row, speedup=math.nan, speedup_ci95=(math.nan, math.nan))
    setting = (row.temperature, row.num_draft_tokens)
    if setting not in {(p.temperature, p.num_draft_tokens) for p in per_prompt}:
        return row
    speedup = choose(per_prompt).speedup
    return replace(row, speedup=speedup.value, speedup_ci95=(speedup.low, speedup.high))


def chosen(chosen_on: int, judged_on: int) -> str:
    """How γ was chosen, in words; nothing where there was nothing to choose."""
    if not chosen_on:
        return ""
    one = "1 prompt" if chosen_on == 1 else f"{chosen_on:,} prompts"
    other = "1 other" if judged_on == 1 else f"{judged_on:,} others"
    return f"γ chosen on {one}, judged on {other}, and the other way round"


def speed_columns(rows: Sequence[PromptRow]) -> Columns:
    """Of the speedup, as `ratio_of_sums` takes them."""
    return (
        [[row.emitted for row in rows], [row.baseline_seconds for row in rows]],
        [[row.seconds for row in rows], [row.baseline_emitted for row in rows]],
    )


def speedup_of(rows: Sequence[PromptRow], seed: int = 0, wider: float = 1.0) -> Ratio:
    """Tokens per second over those of plain decoding, with a paired interval over the prompts."""
    return ratio_of_sums(*speed_columns(rows), seed, wider)


def _fastest(settings: Mapping[Setting, Mapping[str, PromptRow]], ids: Collection[str]) -> Setting:
    """The first in order where several are as fast."""

    def speed(setting: Setting) -> float:
        rows = [settings[setting][id_] for id_ in ids]
        over = sum(r.emitted for r in rows) * sum(r.baseline_seconds for r in rows)
        under = sum(r.seconds for r in rows) * sum(r.baseline_emitted for r in rows)
        return over / under if under > 0 else -math.inf

    return max(settings, key=speed)
