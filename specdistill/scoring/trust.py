"""Which figures of a scorecard cannot be true of one measurement: what gives a wrong card away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from specdistill.errors import InputError, ModelError
from specdistill.scoring.card_rows import (
    PLAIN_SLOWED,
    Baseline,
    ModelCard,
    PromptRow,
    Row,
    of_setting,
    setting_of,
)
from specdistill.scoring.contradictions import (
    changed_figures,
    changed_verdict,
    differing,
    verdict_again,
)
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.statistics import Columns, ratio_of_sums
from specdistill.scoring.verdict import slow_verifying

NOISE = 0.1  # what timings of the same work may differ by beyond their intervals


def doubts(
    baseline: Sequence[Baseline], rows: Sequence[Row], per_prompt: Sequence[PromptRow]
) -> list[str]:
    """Sentences on what does not fit; none for a sound card."""
    if not rows:
        return ["nothing was measured: there are no rows"]
    faults = _totals(baseline, rows, per_prompt)
    for row in rows:
        faults += _slowed(row, of_setting(per_prompt, row.temperature, row.num_draft_tokens))
    return faults


def objections(card: Scorecard) -> list[str]:
    """Why nothing should be concluded from a card; none for a sound one."""
    failed = [f"FAILED, not lossless: {'; '.join(card.failures)}"] if card.failures else []
    wrong = doubts(card.baseline, card.rows, card.per_prompt) or contradictions(card)
    return failed + (wrong or _slowed_at_best(card))


def contradictions(card: Scorecard) -> list[str]:
    """Figures of a card, and a verdict, that are not those of its rows by prompt."""
    distrusted = bool(doubts(card.baseline, card.rows, card.per_prompt))
    return changed_figures(card) or changed_verdict(card, distrusted)


def _slowed_at_best(card: Scorecard) -> list[str]:
    """Where the fastest setting of a temperature has no speedup to tell, see `Row.slowed`."""
    fastest: dict[float, Row] = {}
    for row in sorted(card.rows, key=lambda row: row.speedup):
        fastest[row.temperature] = row
    again = card.provenance.get("measured_again")
    return [
        slow_verifying("a verify pass", (t, row.num_draft_tokens), row.verify_ratio, t == again)
        for t, row in sorted(fastest.items())
        if row.slowed
    ]


def sound_card(path: Path) -> Scorecard:
    """Read a card whose figures are those of its rows by prompt. Raises `InputError` as
    `Scorecard.read`, or with figures that are not; what the card itself says against it is no
    reason. The verdict's reason is words, which nobody can compare: it is written again.
    """
    card = Scorecard.read(path)
    wrong = _totals(card.baseline, card.rows, card.per_prompt) or contradictions(card)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{path} contradicts itself, score the pair again: {wrong[0]}{more}")
    return replace(card, verdict=replace(card.verdict, reason=_reason(card)))


def _reason(card: Scorecard) -> str:
    """The verdict's, from the card's own figures. An outside engine has told more than its card
    holds where its figures were not trusted.
    """
    if card.failures:
        return card.verdict.reason  # derived when the card was made
    wrong = doubts(card.baseline, card.rows, card.per_prompt)
    untold = math.isnan(card.verdict.best.speedup)
    if not wrong and card.outside_engine and card.baseline and untold:
        wrong = [PLAIN_SLOWED]
    return verdict_again(card, wrong).reason


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
    # Here, as this loads torch, and who reads cards alone needs none.
    from specdistill.models.hashes import hashes_of, model_sha256

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


def _totals(
    baseline: Sequence[Baseline], rows: Sequence[Row], per_prompt: Sequence[PromptRow]
) -> list[str]:
    plain = {base.temperature: base for base in baseline}
    faults = []
    for row in rows:
        prompts = of_setting(per_prompt, row.temperature, row.num_draft_tokens)
        base = plain.get(row.temperature)
        if base is None and (baseline or any(prompt.baseline_emitted for prompt in prompts)):
            faults.append(f"{setting_of(row)}: there is no plain decoding at this temperature")
        else:
            faults += _sums(row, base, prompts)
    return faults


def _sums(row: Row, base: Baseline | None, prompts: Sequence[PromptRow]) -> list[str]:
    """The rows by prompt must add up to the totals, and the totals to the speeds."""
    faults = []
    plainly = (0, 0) if base is None else (base.prompts, base.tokens)
    for name, total, summed in (
        ("prompts", row.prompts, len({prompt.prompt_id for prompt in prompts})),
        ("prompts decoded plainly", plainly[0], sum(p.baseline_emitted > 0 for p in prompts)),
        ("emitted tokens", row.emitted, sum(prompt.emitted for prompt in prompts)),
        ("rounds", row.rounds, sum(prompt.rounds for prompt in prompts)),
        ("plain tokens", plainly[1], sum(prompt.baseline_emitted for prompt in prompts)),
    ):
        if total != summed:
            faults.append(
                f"{setting_of(row)}: the card counts {total} {name}, its rows by prompt {summed}; "
                "some were left out, score the pair again"
            )
    seconds, plain_seconds = (
        sum(getattr(prompt, name) for prompt in prompts) for name in ("seconds", "baseline_seconds")
    )
    if prompts and not (seconds > 0 and (base is None or plain_seconds > 0)):
        faults.append(f"{setting_of(row)}: no time passed, so that there is no speed to tell")
    if base is None and not math.isnan(row.speedup):
        faults.append(f"{setting_of(row)}: there is a speedup, and no plain decoding")
    if not faults and prompts:
        speed = row.emitted / seconds
        figures = [("tokens per second", row.tokens_per_second, speed)]
        if base is not None:
            plain = base.tokens / plain_seconds
            figures += [
                ("plain tokens per second", base.tokens_per_second, plain),
                ("speedup", row.speedup, speed / plain),
            ]
        faults += differing(setting_of(row), figures)
    return faults


def _slowed(row: Row, prompts: Sequence[PromptRow]) -> list[str]:
    """A round does all that a plain step does and more, so it cannot take less time."""
    columns = round_cost(prompts)
    if columns is None or not (cost := ratio_of_sums(*columns, seed=0)).high < 1 - NOISE:
        return []
    return [
        f"{setting_of(row)}: a round without its draft steps took {cost.value:.2f} times as long "
        "as a plain step, though it holds one; plain decoding was slowed down, so the speedup is "
        "not the draft's"
    ]
