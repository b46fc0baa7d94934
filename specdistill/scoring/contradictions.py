"""Which figures of a scorecard are not those of its rows by prompt: it was changed after the
measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from specdistill.scoring.card_rows import (
    Baseline,
    CategoryRow,
    PromptRow,
    Row,
    of_setting,
    setting_of,
)
from specdistill.scoring.choice import speedup_of
from specdistill.scoring.scorecard import Scorecard, Verdict
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.statistics import Ratio, planned_speedup
from specdistill.scoring.verdict import verdict


def changed_figures(card: Scorecard) -> list[str]:
    """Figures in sum that are not those of the rows by prompt, beside the speeds; none where the
    rows' sums themselves are wrong, which `trust.doubts` tells.
    """
    faults = _evidence(card)
    seed = card.provenance.get("seed", 0)
    plain = {base.temperature: base for base in card.baseline}
    weights = card.draft.weight_bytes / card.target.weight_bytes
    for row in card.rows:
        prompts = of_setting(card.per_prompt, row.temperature, row.num_draft_tokens)
        base = plain.get(row.temperature)
        if not prompts or (base is None and card.baseline):
            continue
        faults += differing(setting_of(row), _derived(row, base, prompts, weights))
        if not all(map(math.isnan, row.speedup_ci95)):
            interval = speedup_of(prompts, seed)
            faults += _differing_interval(setting_of(row), row.speedup_ci95, interval)
        if base is not None:
            faults += _plain_steps(row, base, prompts)
        faults += _counts(row, prompts)
    return faults or _slices(card, seed)


Figure = tuple[str, float, float]  # what it is, as the card tells it, as it is


def _derived(
    row: Row, base: Baseline | None, prompts: Sequence[PromptRow], weights: float
) -> list[Figure]:
    """What follows from counts and times; of what a card does not tell (NaN, older ones) nothing
    is said.
    """
    figures: list[Figure] = []
    for name in ("tested", "accepted"):
        counts = [getattr(prompt, name) for prompt in prompts]
        if None not in counts:
            figures.append((f"{name} tokens", getattr(row, name), sum(counts)))
    gamma, tau = row.num_draft_tokens, row.emitted / row.rounds
    ratios: list[tuple[str, float, float, float]] = [
        ("an acceptance rate", row.acceptance_rate, row.accepted, row.tested),
        ("accepted / proposed", row.acceptance_per_proposal, row.accepted, row.proposed),
        ("a block efficiency", row.block_efficiency, row.emitted, row.rounds),
        ("an MBSU", row.mbsu, tau, weights * row.draft_steps + 1),
    ]
    by_position = zip(row.survival_by_position, row.acceptance_by_position, strict=True)
    before = 1.0
    for i, (survival, rate) in enumerate(by_position, 1):
        if row.least_reach:  # of all rounds, which no other figure tells
            break
        ratios.append((f"survival at position {i}", survival, before * rate, 1.0))
        before = survival
    if math.isfinite(row.planned_speedup):
        planned = planned_speedup(row.acceptance_rate, gamma, row.cost_ratio, row.draft_steps)
        ratios.append(("a planned speedup", row.planned_speedup, planned, 1.0))
    if base and {"draft", "target"} <= row.seconds.keys() and base.seconds.get("target"):
        step, spent = base.seconds["target"] / base.tokens, row.seconds
        seconds = sum(prompt.seconds for prompt in prompts)
        passes = spent["draft"] + spent["target"]
        ratios += [
            ("seconds by part", sum(spent.values()), seconds, 1.0),
            ("a verify ratio", row.verify_ratio, spent["target"] / row.rounds, step),
            ("a predicted speedup", row.predicted_speedup, row.emitted * step, passes),
        ]
        if step and math.isnan(row.verify_ratio):  # without it nobody sees a slowed baseline
            figures.append(("a verify ratio", math.nan, spent["target"] / row.rounds / step))
    figures += [(name, value, a / b) for name, value, a, b in ratios if b and math.isfinite(value)]
    return figures


def _plain_steps(row: Row, base: Baseline, prompts: Sequence[PromptRow]) -> list[str]:
    """The time of a plain step and its parts, and what cannot be."""
    seconds = sum(prompt.baseline_seconds for prompt in prompts)
    where = f"T = {base.temperature:g}, plain decoding"
    figures = [("seconds of all steps", base.seconds_per_step * base.tokens, seconds)]
    if base.seconds:
        figures.append(("seconds by part", sum(base.seconds.values()), seconds))
    faults = differing(where, figures)
    if bool(base.seconds) != bool(row.seconds):
        faults.append(f"{setting_of(row)}: only one of draft and plain decoding tells its parts")
    parts = [*base.seconds.values(), *row.seconds.values()]
    parts += [p.verifying_seconds for p in prompts if p.verifying_seconds is not None]
    parts += [p.stepping_seconds for p in prompts if p.stepping_seconds is not None]
    if any(part < 0 for part in parts):
        faults.append(f"{setting_of(row)}: a part took less than no time, which cannot be")
    return faults


def _counts(row: Row, prompts: Sequence[PromptRow]) -> list[str]:
    """Counts and times that cannot be."""
    faults = []
    if not row.tested <= row.proposed <= row.rounds * row.num_draft_tokens:
        faults.append(
            f"{setting_of(row)}: {row.proposed} tokens were proposed and {row.tested} tested in "
            f"{row.rounds} rounds, which cannot be"
        )
    for name in ("tested", "accepted", "verifying_seconds", "stepping_seconds", "prompt_tokens"):
        silent = sum(getattr(prompt, name) is None for prompt in prompts)
        if 0 < silent < len(prompts):
            faults.append(f"{setting_of(row)}: {silent} prompts do not tell their {name}")
    for prompt in prompts:
        for name, part, whole in (
            ("verifying", prompt.verifying_seconds, prompt.seconds),
            ("stepping", prompt.stepping_seconds, prompt.baseline_seconds),
        ):
            if part is not None and part > whole * (1 + 1e-6):
                faults.append(
                    f"{setting_of(row)}: prompt {prompt.prompt_id} spent {part:.4g} s of "
                    f"{whole:.4g} s {name}, which cannot be"
                )
        accepted = prompt.accepted
        if accepted is None or prompt.tested is None:
            continue
        if not accepted <= prompt.tested <= prompt.rounds * row.num_draft_tokens:
            counts = f"{accepted} of {prompt.tested} tested tokens accepted"
        elif not prompt.emitted <= accepted + prompt.rounds:
            counts = f"{prompt.emitted} tokens of {accepted} accepted ones"
        else:
            continue
        faults.append(
            f"{setting_of(row)}: prompt {prompt.prompt_id} has {counts} in {prompt.rounds} rounds, "
            "which cannot be"
        )
    return faults


def differing(where: str, figures: Sequence[Figure]) -> list[str]:
    """A sentence on each figure that is not what it is computed to be."""
    return [
        f"{where}: the card tells {name} of {claimed:.4g}, its rows by prompt give "
        f"{computed:.4g}; it was changed after the measurement"
        for name, claimed, computed in figures
        if not math.isclose(claimed, computed, rel_tol=1e-6, abs_tol=1e-9)
    ]


def _differing_interval(where: str, claimed: tuple[float, float], computed: Ratio) -> list[str]:
    """Resampling may have been another version's: the ends agree but for a twentieth of their
    distance.
    """
    if math.isnan(claimed[0]) and math.isnan(claimed[1]):
        return []
    if not any(map(math.isnan, (*claimed, computed.low))):
        allowed = 0.1 * math.log(computed.high / computed.low) / 2 + 1e-9
        pairs = zip(claimed, computed[1:], strict=True)
        if all(abs(math.log(one / other)) <= allowed for one, other in pairs):
            return []
    return [
        f"{where}: the card tells an interval of [{claimed[0]:.4g}, {claimed[1]:.4g}], its rows by "
        f"prompt give [{computed.low:.4g}, {computed.high:.4g}]; it was changed after the "
        "measurement"
    ]


def _slices(card: Scorecard, seed: int) -> list[str]:
    """The scores by category and by length; older cards have none of the latter."""
    faults = []
    for name, slice_ in (("by_category", by_category), ("by_prompt_length", by_prompt_length)):
        claimed: list[CategoryRow] = getattr(card, name)
        if not claimed:
            continue
        rows = {_key(row): row for row in slice_(card.per_prompt, seed)}
        if rows.keys() != {_key(row) for row in claimed}:
            faults.append(f"{name} does not have the categories and settings of its rows by prompt")
            continue
        for row in claimed:
            computed, where = rows[_key(row)], f"{name}, {row.category}, {setting_of(row)}"
            counts = ("prompts", "tested", "accepted")
            figures = (*counts, "acceptance_rate", "block_efficiency", "speedup")
            pairs = [(f, getattr(row, f), getattr(computed, f)) for f in figures]
            shown = [(f.replace("_", " "), a, b) for f, a, b in pairs if not math.isnan(a)]
            faults += differing(where, shown)
            ratio = Ratio(computed.speedup, *computed.speedup_ci95)
            faults += _differing_interval(where, row.speedup_ci95, ratio)
    return faults


def _key(row: CategoryRow) -> tuple[str, float, int]:
    return row.category, row.temperature, row.num_draft_tokens


def _evidence(card: Scorecard) -> list[str]:
    """Greedy texts that are identical are as long as plain ones, every prompt is compared, and in
    the dtype of the target.
    """
    proof, kind = card.lossless, card.target.dtype
    if proof.dtype not in ("", kind):
        return [
            f"the target is of {kind}, its evidence of {proof.dtype}; it was changed after the "
            "measurement"
        ]
    wide = proof.float32
    if wide is not None and not wide.missing and not wide.greedy_identical[1]:
        return ["the card names evidence in float32, and compares nothing there"]
    rows = [row for row in card.per_prompt if row.temperature == 0 and row.baseline_emitted]
    same, compared = card.lossless.greedy_identical
    longest = sum(row.emitted == row.baseline_emitted for row in rows)
    if compared != len(rows):
        return [
            f"the card compares {compared} greedy texts, its rows by prompt have {len(rows)}; some "
            "were left out, score the pair again"
        ]
    if same > longest:
        return [
            f"the card calls {same} greedy texts identical to plain ones, but only {longest} are "
            "as long; it was changed after the measurement"
        ]
    return []


def by_halves(card: Scorecard) -> bool:
    """Whether the γ was judged on other prompts than chose it, as it was not in older cards."""
    return bool(card.verdict.chosen_on) or not math.isnan(card.verdict.speedup_ci95[0])


def verdict_again(card: Scorecard, doubts: Sequence[str] = ()) -> Verdict:
    """What the card's rows come to."""
    return verdict(
        card.rows,
        card.verification,
        doubts,
        card.per_prompt if by_halves(card) else (),
        card.provenance.get("measured_again"),
    )


def changed_verdict(card: Scorecard, distrusted: bool) -> list[str]:
    """Where the verdict is not that of the same figures, which may be `distrusted`; by the halves
    of the prompts or, in older cards, without.
    """
    claimed = card.verdict
    if card.failures:
        return []
    t, num = claimed.best.temperature, claimed.best.num_draft_tokens
    where = f"the verdict at T = {t:g}, γ = {num}"
    if distrusted or math.isnan(claimed.best.speedup):
        if not claimed.pays:
            return []
        return [f"{where} is that the draft pays, and its figures cannot be trusted"]
    again = verdict_again(card)
    halves = by_halves(card)
    best = (again.best.temperature, again.best.num_draft_tokens)
    if (claimed.pays, (t, num)) != (again.pays, best):
        verb = {True: "pays", False: "does not pay"}
        return [
            f"{where} is that the draft {verb[claimed.pays]}, its rows by prompt say that it "
            f"{verb[again.pays]} at T = {best[0]:g}, γ = {best[1]}; it was changed after the "
            "measurement"
        ]
    figures = [
        ("a speedup", claimed.best.speedup, again.best.speedup),
        ("a break-even", claimed.break_even_acceptance, again.break_even_acceptance),
        ("a break-even cost", claimed.break_even_cost_ratio, again.break_even_cost_ratio),
    ]
    if halves:
        figures += [
            ("a choice by prompts", claimed.chosen_on, again.chosen_on),
            ("a judgement by prompts", claimed.judged_on, again.judged_on),
        ]
    faults = differing(where, [f for f in figures if not math.isnan(f[1])])
    ratio = Ratio(again.best.speedup, *again.speedup_ci95)
    return faults or (_differing_interval(where, claimed.speedup_ci95, ratio) if halves else [])
