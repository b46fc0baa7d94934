"""Which figures of a scorecard cannot be true of one measurement: what gives a wrong card away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from specdistill.errors import ModelError
from specdistill.hashes import hashes_of, model_sha256
from specdistill.scoring.scorecard import Baseline, ModelCard, PromptRow, Row, Scorecard
from specdistill.scoring.statistics import ratio_of_sums

NOISE = 0.1  # what timings of the same work may differ by beyond their intervals
Columns = tuple[list[Sequence[float]], list[Sequence[float]]]


def doubts(
    baseline: Sequence[Baseline], rows: Sequence[Row], per_prompt: Sequence[PromptRow]
) -> list[str]:
    """Sentences on what does not fit; none for a sound card."""
    if not rows:
        return ["nothing was measured: there are no rows"]
    found = []
    plain = {base.temperature: base for base in baseline}
    for row in rows:
        prompts = of_setting(per_prompt, row.temperature, row.num_draft_tokens)
        base = plain.get(row.temperature)
        if base is None:
            found.append(f"{_setting(row)}: there is no plain decoding at this temperature")
        else:
            found += _sums(row, base, prompts) + _slowed(row, prompts)
    return found


def objections(card: Scorecard) -> list[str]:
    """Why nothing should be concluded from a card; none for a sound one."""
    failed = [f"FAILED, not lossless: {'; '.join(card.failures)}"] if card.failures else []
    return failed + doubts(card.baseline, card.rows, card.per_prompt)


def of_setting(
    per_prompt: Sequence[PromptRow], temperature: float, num_draft_tokens: int
) -> list[PromptRow]:
    setting = (temperature, num_draft_tokens)
    return [row for row in per_prompt if (row.temperature, row.num_draft_tokens) == setting]


def round_cost(prompts: Sequence[PromptRow]) -> Columns | None:
    """Time of a round without its draft steps over that of a plain step, both with their overhead
    and without the prompts' prefill, as a `ratio_of_sums`. None for cards that do not tell.
    """
    verifying = [p.verifying_seconds for p in prompts if p.verifying_seconds is not None]
    stepping = [p.stepping_seconds for p in prompts if p.stepping_seconds is not None]
    if not prompts or len(verifying) < len(prompts) or len(stepping) < len(prompts):
        return None
    tokens, rounds = [p.baseline_emitted for p in prompts], [p.rounds for p in prompts]
    return [verifying, tokens], [rounds, stepping]


def swapped_draft(draft: ModelCard, folder: Path) -> list[str]:
    """A doubt where the model in `folder` is not the one that was scored."""
    try:
        if draft.sha256 in hashes_of(folder):
            return []
        now = model_sha256(folder)
    except ModelError as error:
        return [f"{error}; it was scored as {draft.sha256[:12]}"]
    return [
        f"{folder} holds another draft (sha256 {now[:12]}) than the one that was scored "
        f"({draft.sha256[:12]}); score it again"
    ]


def _sums(row: Row, base: Baseline, prompts: Sequence[PromptRow]) -> list[str]:
    """The rows by prompt must add up to the totals, and the totals to the speeds."""
    found = []
    for name, total, summed in (
        ("prompts", row.prompts, len({prompt.prompt_id for prompt in prompts})),
        ("prompts decoded plainly", base.prompts, len(prompts)),
        ("emitted tokens", row.emitted, sum(prompt.emitted for prompt in prompts)),
        ("rounds", row.rounds, sum(prompt.rounds for prompt in prompts)),
        ("plain tokens", base.tokens, sum(prompt.baseline_emitted for prompt in prompts)),
    ):
        if total != summed:
            found.append(
                f"{_setting(row)}: the card counts {total} {name}, its rows by prompt {summed}; "
                "some were left out, score the pair again"
            )
    seconds, plain_seconds = (
        sum(getattr(prompt, name) for prompt in prompts) for name in ("seconds", "baseline_seconds")
    )
    if prompts and not (seconds > 0 and plain_seconds > 0):
        found.append(f"{_setting(row)}: no time passed, so that there is no speed to tell")
    if not found and prompts:
        speed, plain = row.emitted / seconds, base.tokens / plain_seconds
        for name, told, is_ in (
            ("tokens per second", row.tokens_per_second, speed),
            ("plain tokens per second", base.tokens_per_second, plain),
            ("speedup", row.speedup, speed / plain),
        ):
            if not math.isclose(told, is_, rel_tol=1e-6):
                found.append(
                    f"{_setting(row)}: the card tells {name} of {told:.4g}, its rows by prompt "
                    f"give {is_:.4g}; it was changed after the measurement"
                )
    return found


def _slowed(row: Row, prompts: Sequence[PromptRow]) -> list[str]:
    """A round does all that a plain step does and more, so it cannot take less time."""
    columns = round_cost(prompts)
    if columns is None:
        return []
    cost = ratio_of_sums(*columns, seed=0)
    if not cost.high < 1 - NOISE:
        return []
    return [
        f"{_setting(row)}: a round without its draft steps took {cost.value:.2f} times as long as "
        "a plain step, though it holds one; plain decoding was slowed down, so the speedup is not "
        "the draft's"
    ]


def _setting(row: Row) -> str:
    return f"T = {row.temperature:g}, γ = {row.num_draft_tokens}"
