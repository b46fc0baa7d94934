"""Which figures of a scorecard cannot be true of one measurement: what gives a wrong card away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from specdistill.errors import InputError, ModelError
from specdistill.models.hashes import hashes_of, model_sha256
from specdistill.scoring.scorecard import (
    Baseline,
    CategoryRow,
    ModelCard,
    PromptRow,
    Row,
    Scorecard,
)
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.statistics import Ratio, planned_speedup, ratio_of_sums
from specdistill.scoring.verdict import slow_verifying, verdict

NOISE = 0.1  # what timings of the same work may differ by beyond their intervals
Columns = tuple[list[Sequence[float]], list[Sequence[float]]]


def doubts(
    baseline: Sequence[Baseline], rows: Sequence[Row], per_prompt: Sequence[PromptRow]
) -> list[str]:
    """Sentences on what does not fit; none for a sound card."""
    if not rows:
        return ["nothing was measured: there are no rows"]
    return [
        *_totals(baseline, rows, per_prompt),
        *(
            doubt
            for row in rows
            for doubt in _slowed(row, of_setting(per_prompt, row.temperature, row.num_draft_tokens))
        ),
    ]


def objections(card: Scorecard) -> list[str]:
    """Why nothing should be concluded from a card; none for a sound one."""
    failed = [f"FAILED, not lossless: {'; '.join(card.failures)}"] if card.failures else []
    wrong = doubts(card.baseline, card.rows, card.per_prompt) or contradictions(card)
    return failed + (wrong or _slowed_at_best(card))


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
    reason.
    """
    card = Scorecard.read(path)
    wrong = _totals(card.baseline, card.rows, card.per_prompt) or contradictions(card)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{path} contradicts itself, score the pair again: {wrong[0]}{more}")
    return card


def contradictions(card: Scorecard) -> list[str]:
    """Figures in sum that are not those of the rows by prompt, beside the speeds; none where the
    rows' sums themselves are wrong, which `doubts` tell.
    """
    found = _evidence(card)
    seed = card.provenance.get("seed", 0)
    plain = {base.temperature: base for base in card.baseline}
    weights = card.draft.weight_bytes / card.target.weight_bytes
    for row in card.rows:
        prompts = of_setting(card.per_prompt, row.temperature, row.num_draft_tokens)
        base = plain.get(row.temperature)
        if base is None or not prompts:
            continue
        found += _differing(_setting(row), _derived(row, base, prompts, weights))
        found += _interval(row, prompts, seed)
        found += _plain_steps(row, base, prompts)
    return found or _slices(card, seed) or _verdict(card)


Told = tuple[str, float, float]  # what it is, as the card tells it, as it is


def _derived(row: Row, base: Baseline, prompts: Sequence[PromptRow], weights: float) -> list[Told]:
    """What follows from counts and times; of what a card does not tell (NaN, older ones) nothing
    is said.
    """
    found: list[Told] = []
    for name in ("tested", "accepted"):
        counts = [getattr(prompt, name) for prompt in prompts]
        if None not in counts:
            found.append((f"{name} tokens", getattr(row, name), sum(counts)))
    gamma, tau = row.num_draft_tokens, row.emitted / row.rounds
    ratios: list[tuple[str, float, float, float]] = [
        ("an acceptance rate", row.acceptance_rate, row.accepted, row.tested),
        ("accepted / proposed", row.acceptance_per_proposal, row.accepted, row.proposed),
        ("a block efficiency", row.block_efficiency, row.emitted, row.rounds),
        ("an MBSU", row.mbsu, tau, weights * row.draft_steps + 1),
    ]
    by_position = zip(row.survival_by_position, row.acceptance_by_position, strict=True)
    before = 1.0
    for i, (told, rate) in enumerate(by_position, 1):
        if row.least_reach:  # of all rounds, which no other figure tells
            break
        ratios.append((f"survival at position {i}", told, before * rate, 1.0))
        before = told
    if math.isfinite(row.planned_speedup):
        planned = planned_speedup(row.acceptance_rate, gamma, row.cost_ratio)
        ratios.append(("a planned speedup", row.planned_speedup, planned, 1.0))
    if {"draft", "target"} <= row.seconds.keys() and base.seconds.get("target"):
        step, spent = base.seconds["target"] / base.tokens, row.seconds
        seconds = sum(prompt.seconds for prompt in prompts)
        passes = spent["draft"] + spent["target"]
        ratios += [
            ("seconds by part", sum(spent.values()), seconds, 1.0),
            ("a verify ratio", row.verify_ratio, spent["target"] / row.rounds, step),
            ("a predicted speedup", row.predicted_speedup, row.emitted * step, passes),
        ]
        if step and math.isnan(row.verify_ratio):  # without it nobody sees a slowed baseline
            found.append(("a verify ratio", math.nan, spent["target"] / row.rounds / step))
    found += [(name, told, a / b) for name, told, a, b in ratios if b and math.isfinite(told)]
    return found


def _plain_steps(row: Row, base: Baseline, prompts: Sequence[PromptRow]) -> list[str]:
    """The time of a plain step and its parts, and what cannot be."""
    seconds = sum(prompt.baseline_seconds for prompt in prompts)
    where = f"T = {base.temperature:g}, plain decoding"
    figures = [("seconds of all steps", base.seconds_per_step * base.tokens, seconds)]
    if base.seconds:
        figures.append(("seconds by part", sum(base.seconds.values()), seconds))
    found = _differing(where, figures)
    if not row.tested <= row.proposed <= row.rounds * row.num_draft_tokens:
        found.append(
            f"{_setting(row)}: {row.proposed} tokens were proposed and {row.tested} tested in "
            f"{row.rounds} rounds, which cannot be"
        )
    if bool(base.seconds) != bool(row.seconds):
        found.append(f"{_setting(row)}: only one of draft and plain decoding tells its parts")
    parts = [*base.seconds.values(), *row.seconds.values()]
    parts += [p.verifying_seconds for p in prompts if p.verifying_seconds is not None]
    parts += [p.stepping_seconds for p in prompts if p.stepping_seconds is not None]
    if any(part < 0 for part in parts):
        found.append(f"{_setting(row)}: a part took less than no time, which cannot be")
    return found + _counts(row, prompts)


def _counts(row: Row, prompts: Sequence[PromptRow]) -> list[str]:
    """Counts and times by prompt that cannot be."""
    found = []
    for name in ("tested", "accepted", "verifying_seconds", "stepping_seconds", "prompt_tokens"):
        silent = sum(getattr(prompt, name) is None for prompt in prompts)
        if 0 < silent < len(prompts):
            found.append(f"{_setting(row)}: {silent} prompts do not tell their {name}")
    for prompt in prompts:
        for name, part, whole in (
            ("verifying", prompt.verifying_seconds, prompt.seconds),
            ("stepping", prompt.stepping_seconds, prompt.baseline_seconds),
        ):
            if part is not None and part > whole * (1 + 1e-6):
                found.append(
                    f"{_setting(row)}: prompt {prompt.prompt_id} spent {part:.4g} s of "
                    f"{whole:.4g} s {name}, which cannot be"
                )
        accepted = prompt.accepted
        if accepted is None or prompt.tested is None:
            continue
        if not accepted <= prompt.tested <= prompt.rounds * row.num_draft_tokens:
            told = f"{accepted} of {prompt.tested} tested tokens accepted"
        elif not prompt.emitted <= accepted + prompt.rounds:
            told = f"{prompt.emitted} tokens of {accepted} accepted ones"
        else:
            continue
        found.append(
            f"{_setting(row)}: prompt {prompt.prompt_id} has {told} in {prompt.rounds} rounds, "
            "which cannot be"
        )
    return found


def _differing(where: str, figures: Sequence[Told]) -> list[str]:
    return [
        f"{where}: the card tells {name} of {told:.4g}, its rows by prompt give {is_:.4g}; it was "
        "changed after the measurement"
        for name, told, is_ in figures
        if not math.isclose(told, is_, rel_tol=1e-6, abs_tol=1e-9)
    ]


def _interval(row: Row, prompts: Sequence[PromptRow], seed: int) -> list[str]:
    if all(map(math.isnan, row.speedup_ci95)):
        return []
    emitted, seconds, plain_emitted, plain_seconds = (
        [getattr(prompt, name) for prompt in prompts]
        for name in ("emitted", "seconds", "baseline_emitted", "baseline_seconds")
    )
    is_ = ratio_of_sums([emitted, plain_seconds], [plain_emitted, seconds], seed)
    return _differing_interval(_setting(row), row.speedup_ci95, is_)


def _differing_interval(where: str, told: tuple[float, float], is_: Ratio) -> list[str]:
    """Resampling may have been another version's: the ends agree but for a twentieth of their
    distance.
    """
    if math.isnan(told[0]) and math.isnan(told[1]):
        return []
    if not any(map(math.isnan, (*told, is_.low))):
        allowed = 0.1 * math.log(is_.high / is_.low) / 2 + 1e-9
        pairs = zip(told, is_[1:], strict=True)
        if all(abs(math.log(one / other)) <= allowed for one, other in pairs):
            return []
    return [
        f"{where}: the card tells an interval of [{told[0]:.4g}, {told[1]:.4g}], its rows by "
        f"prompt give [{is_.low:.4g}, {is_.high:.4g}]; it was changed after the measurement"
    ]


def _slices(card: Scorecard, seed: int) -> list[str]:
    """The scores by category and by length; older cards have none of the latter."""
    found = []
    for name, slice_ in (("by_category", by_category), ("by_prompt_length", by_prompt_length)):
        told: list[CategoryRow] = getattr(card, name)
        if not told:
            continue
        rows = {_key(row): row for row in slice_(card.per_prompt, seed)}
        if rows.keys() != {_key(row) for row in told}:
            found.append(f"{name} does not have the categories and settings of its rows by prompt")
            continue
        for row in told:
            is_, where = rows[_key(row)], f"{name}, {row.category}, {_setting(row)}"
            counts = ("prompts", "tested", "accepted")
            figures = (*counts, "acceptance_rate", "block_efficiency", "speedup")
            pairs = [(f, getattr(row, f), getattr(is_, f)) for f in figures]
            told_of = [(f.replace("_", " "), a, b) for f, a, b in pairs if not math.isnan(a)]
            found += _differing(where, told_of)
            ratio = Ratio(is_.speedup, *is_.speedup_ci95)
            found += _differing_interval(where, row.speedup_ci95, ratio)
    return found


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
    rows = [row for row in card.per_prompt if row.temperature == 0]
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


def _verdict(card: Scorecard) -> list[str]:
    """That of the same figures, by the halves of the prompts or, in older cards, without."""
    told = card.verdict
    if card.failures:
        return []
    where = f"the verdict at T = {told.best.temperature:g}, γ = {told.best.num_draft_tokens}"
    distrusted = bool(doubts(card.baseline, card.rows, card.per_prompt))
    if distrusted or math.isnan(told.best.speedup):
        if not told.pays:
            return []
        return [f"{where} is that the draft pays, and its figures cannot be trusted"]
    halves = told.chosen_on or not math.isnan(told.speedup_ci95[0])
    again = verdict(
        card.rows,
        card.verification,
        per_prompt=card.per_prompt if halves else (),
        measured_again=card.provenance.get("measured_again"),
    )
    best = (again.best.temperature, again.best.num_draft_tokens)
    if (told.pays, (told.best.temperature, told.best.num_draft_tokens)) != (again.pays, best):
        verb = {True: "pays", False: "does not pay"}
        return [
            f"{where} is that the draft {verb[told.pays]}, its rows by prompt say that it "
            f"{verb[again.pays]} at T = {best[0]:g}, γ = {best[1]}; it was changed after the "
            "measurement"
        ]
    figures = [
        ("a speedup", told.best.speedup, again.best.speedup),
        ("a break-even", told.break_even_acceptance, again.break_even_acceptance),
        ("a break-even cost", told.break_even_cost_ratio, again.break_even_cost_ratio),
    ]
    if halves:
        figures += [
            ("a choice by prompts", told.chosen_on, again.chosen_on),
            ("a judgement by prompts", told.judged_on, again.judged_on),
        ]
    found = _differing(where, [f for f in figures if not math.isnan(f[1])])
    ratio = Ratio(again.best.speedup, *again.speedup_ci95)
    return found or (_differing_interval(where, told.speedup_ci95, ratio) if halves else [])


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


def _totals(
    baseline: Sequence[Baseline], rows: Sequence[Row], per_prompt: Sequence[PromptRow]
) -> list[str]:
    plain = {base.temperature: base for base in baseline}
    found = []
    for row in rows:
        prompts = of_setting(per_prompt, row.temperature, row.num_draft_tokens)
        base = plain.get(row.temperature)
        if base is None:
            found.append(f"{_setting(row)}: there is no plain decoding at this temperature")
        else:
            found += _sums(row, base, prompts)
    return found


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


def _setting(row: Row | CategoryRow) -> str:
    return f"T = {row.temperature:g}, γ = {row.num_draft_tokens}"
