"""Can a score be trusted? Known answers by a clock that only the models move, and tampering."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import simulate
from conftest import tiny_model
from scipy import stats
from score_checks import Cost, score_by_clock

from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel, load
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.scoring import measure
from specdistill.scoring.card_rows import Row
from specdistill.scoring.scorecard import Best, Scorecard
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.statistics import acceptance_for, planned_tokens
from specdistill.scoring.trust import contradictions, doubts, objections, sound_card
from specdistill.scoring.verdict import verdict

PROMPTS = [
    measure.EncodedPrompt(str(i), [5 + i, 9, 30 - i], ("short", "long")[i % 2]) for i in range(6)
]
STEP, EXTRA, DRAFT_STEP = 1.0, 0.04, 0.2  # of a plain step, each further token in a pass, a draft's


def cost(slowed: float) -> Cost:
    """`slowed` makes passes over one token take longer."""

    def seconds(_: int, target: bool, tokens: int) -> float:
        if not target:
            return DRAFT_STEP
        return STEP * slowed if tokens == 1 else STEP + EXTRA * (tokens - 1)

    return seconds


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, ...]:
    target = load(str(tiny_folder), dtype="float64")
    folder = tmp_path_factory.mktemp("pair")
    save_draft(make_draft(target, [0, 1, 2]), folder)
    return target, load(str(folder), dtype="float64")


def score(pair: tuple[LanguageModel, ...], slowed: float, temperatures: list[float]) -> Scorecard:
    settings = {"num_draft_tokens": [1, 4], "temperature": temperatures, "max_new_tokens": 25}
    return score_by_clock(pair, cost(slowed), PROMPTS, **settings)


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, ...]) -> Scorecard:
    return score(pair, 1.0, [0.0, 1.0])


# The target as its own draft


def test_the_target_as_its_own_draft_accepts_everything(monkeypatch) -> None:
    """α = 1 and τ = γ + 1; of rounds that an answer's end cuts short, those that it does not."""
    monkeypatch.setattr(LanguageModel, "eos_ids", frozenset())
    target = tiny_model(dtype=torch.float64)
    card = measure.score(
        target, target, PROMPTS, num_draft_tokens=[1, 4], temperature=[0.0, 1.0], max_new_tokens=20
    )
    assert len(card.rows) == 4
    for row in card.rows:
        assert row.acceptance_rate == 1
        assert row.acceptance_rate_expected == pytest.approx(1)
        assert row.survival_by_position == [1.0] * row.num_draft_tokens
        assert row.block_efficiency == row.num_draft_tokens + 1, "20 is a multiple of 2 and of 5"
    decoder = SpeculativeDecoder(
        target, ModelDrafter(target, target.vocab_size), num_draft_tokens=4
    )
    outputs = decoder.generate(
        [p.tokens for p in PROMPTS], max_new_tokens=23, sampling=Sampling(1.0), seed=3
    ).outputs
    for output in outputs:
        assert [len(r.tokens) for r in output.rounds] == [5, 5, 5, 5, 3]
        assert all(r.accepted == r.tested for r in output.rounds)


# A clock whose speed is known


def test_every_figure_comes_from_the_measurement(card: Scorecard) -> None:
    """Speedup, cost ratios, profile and prediction, from the costs that the clock knows."""
    prefill = len(PROMPTS) * (STEP + EXTRA)  # two tokens of each prompt
    plain = {base.temperature: base for base in card.baseline}
    for base in card.baseline:
        assert base.seconds["prefill"] == pytest.approx(prefill)
        assert base.seconds["target"] == pytest.approx(base.tokens * STEP)
        assert sum(base.seconds.values()) == pytest.approx(base.tokens / base.tokens_per_second)
    settings = [(row.temperature, row.num_draft_tokens) for row in card.rows]
    assert settings == [(0, 1), (0, 4), (1, 1), (1, 4)]
    for row in card.rows:
        base = plain[row.temperature]
        assert row.cost_ratio == pytest.approx(DRAFT_STEP)
        longest = STEP + EXTRA * row.num_draft_tokens
        assert 0.95 * longest < row.verify_ratio <= longest, "the last rounds are shorter"
        spent = row.seconds["draft"] + row.seconds["target"]
        assert row.predicted_speedup == pytest.approx(row.emitted * STEP / spent)
        assert row.seconds["prefill"] == pytest.approx(prefill + len(PROMPTS) * DRAFT_STEP)
        total = sum(row.seconds.values())
        plainly = base.tokens * STEP + prefill
        assert row.speedup == pytest.approx((row.emitted / total) / (base.tokens / plainly))
        for field in Row.__dataclass_fields__:
            value = getattr(row, field)
            if isinstance(value, float):
                assert math.isfinite(value), field
        assert row.survival_by_position[0] == row.acceptance_by_position[0] > 0
        for i, survival in enumerate(row.survival_by_position[1:], 1):
            assert survival <= row.survival_by_position[i - 1]
    assert not doubts(card.baseline, card.rows, card.per_prompt)
    assert sum(p.accepted or 0 for p in card.per_prompt) == sum(row.accepted for row in card.rows)
    for prompt in card.per_prompt:
        assert prompt.stepping_seconds == pytest.approx(prompt.baseline_emitted * STEP)


def test_categories_add_up(card: Scorecard) -> None:
    assert {c.category for c in card.by_prompt_length} == {"2–3 tokens"}
    assert sum(c.tested for c in card.by_prompt_length) == sum(row.tested for row in card.rows)
    assert [(c.temperature, c.num_draft_tokens, c.category) for c in card.by_category] == [
        (t, g, category) for t in (0, 1) for g in (1, 4) for category in ("long", "short")
    ]
    for row in card.rows:
        setting = (row.temperature, row.num_draft_tokens)
        parts = [c for c in card.by_category if (c.temperature, c.num_draft_tokens) == setting]
        assert [c.prompts for c in parts] == [3, 3]
        assert sum(c.tested for c in parts) == row.tested
        assert sum(c.accepted for c in parts) == row.accepted
        for part in parts:
            mine = [
                p
                for p in card.per_prompt
                if (p.category, p.temperature, p.num_draft_tokens) == (part.category, *setting)
            ]
            assert part.acceptance_rate == pytest.approx(part.accepted / part.tested)
            emitted = sum(p.emitted for p in mine)
            assert part.block_efficiency == pytest.approx(emitted / sum(p.rounds for p in mine))
            plain = sum(p.baseline_emitted for p in mine) / sum(p.baseline_seconds for p in mine)
            speed = emitted / sum(p.seconds for p in mine)
            assert part.speedup == pytest.approx(speed / plain)
            assert part.speedup_ci95[0] <= part.speedup <= part.speedup_ci95[1]


def test_lengths_of_prompts_in_bands() -> None:
    rows = simulate({(0.0, 3): 0.6}).per_prompt
    lengths = [1, 63, 64, 127, 128, 100, 2048, 4095, 70, 4096]
    known = [replace(r, prompt_tokens=n) for r, n in zip(rows, lengths, strict=False)]
    bands = by_prompt_length([*known, *rows[len(known) :]], seed=0)
    assert {b.category: b.prompts for b in bands} == {
        "1–1 tokens": 1,
        "32–63 tokens": 1,
        "64–127 tokens": 4,
        "128–255 tokens": 1,
        "2,048–4,095 tokens": 2,
        "4,096–8,191 tokens": 1,
    }
    assert [b.category for b in bands][-1] == "4,096–8,191 tokens", "in their order"
    assert sum(b.tested for b in bands) == sum(r.tested or 0 for r in known)
    assert by_prompt_length(rows, seed=0) == [], "older cards"


def test_prompts_without_a_category_are_in_none() -> None:
    rows = simulate({(0.0, 3): 0.6}).per_prompt
    unnamed = [replace(row, category=None) for row in rows[::2]]
    (only,) = by_category([*unnamed, *rows[1::2]], seed=0)
    assert (only.category, only.prompts) == ("steps", 12)
    assert by_category(unnamed, seed=0) == []
    for few, shown in ((2, False), (3, True)):
        (row,) = by_category(rows[1::2][:few], seed=0)
        assert (row.speedup_ci95[0] > 0) == shown


def test_a_slowed_baseline_does_not_pay(pair, card: Scorecard) -> None:
    slow = score(pair, 2.5, [0.0])
    assert slow.rows[1].speedup > 2 * card.rows[1].speedup
    assert not slow.verdict.pays
    assert slow.verdict.reason.startswith("These figures cannot be trusted: T = 0, γ = 1: a round ")
    assert "plain decoding was slowed down" in slow.verdict.reason
    assert "cannot be trusted" not in card.verdict.reason


# What a card says in sum against what its rows by prompt give


def changed(card: Scorecard, path: str, value: object) -> dict[str, Any]:
    """The card's document with another value in one place, which a function makes of the old."""
    document = json.loads(json.dumps(card.document()))
    *way, last = (int(name) if name.isdigit() else name for name in path.split("."))
    place = document
    for name in way:
        place = place[name]
    place[last] = value(place[last]) if callable(value) else value
    return document


FORGED: dict[str, tuple[str, object, str]] = {
    "speedup": ("rows.0.speedup", 9.0, "the card tells speedup of 9,"),
    "interval": ("rows.0.speedup_ci95", [1.9, 2.0], "tells an interval of [1.9, 2]"),
    "one end": ("rows.0.speedup_ci95.0", None, "tells an interval of [nan, "),
    "tested": ("rows.0.tested", 1, "tells tested tokens of 1,"),
    "accepted": ("rows.0.accepted", 9000, "tells accepted tokens of 9000"),
    "proposals": ("rows.0.proposed", 0, "0 tokens were proposed and "),
    "α": ("rows.0.acceptance_rate", 0.99, "tells an acceptance rate of 0.99"),
    "per proposal": ("rows.0.acceptance_per_proposal", 0.99, "tells accepted / proposed of"),
    "τ": ("rows.0.block_efficiency", 2.9, "tells a block efficiency of 2.9"),
    "survival": ("rows.0.survival_by_position", [0.9, 0.9], "tells survival at position 1"),
    "MBSU": ("rows.0.mbsu", 2.5, "tells an MBSU of 2.5"),
    "planned": ("rows.0.planned_speedup", 2.5, "tells a planned speedup of 2.5"),
    "predicted": ("rows.0.predicted_speedup", 2.5, "tells a predicted speedup of 2.5"),
    "v": ("rows.0.verify_ratio", 1.01, "tells a verify ratio of 1.01"),
    "no v": ("rows.0.verify_ratio", None, "tells a verify ratio of nan"),
    "time": ("rows.0.seconds", {"draft": 1.0, "target": 9.0}, "tells seconds by part of 10"),
    "parts": ("rows.0.seconds", {}, "only one of draft and plain decoding tells its parts"),
    "plain speed": ("baseline.0.tokens_per_second", 1.0, "plain tokens per second of 1,"),
    "plain step": ("baseline.0.seconds_per_step", 1.0, "plain decoding: the card tells seconds"),
    "plain parts": ("baseline.0.seconds.prefill", -1.0, "a part took less than no time"),
    "more of them": ("baseline.0.seconds.prefill", lambda old: old + 1, "seconds by part of"),
    "verifying": ("per_prompt.0.verifying_seconds", -1.0, "a part took less than no time"),
    "one prompt's": ("per_prompt.0.verifying_seconds", None, "1 prompts do not tell their verify"),
    "stepping": ("per_prompt.0.stepping_seconds", lambda old: 2 * old, "prompt p0 spent "),
    "category": ("by_category.0.category", "else", "does not have the categories"),
    "its speedup": ("by_category.0.speedup", 9.0, "by_category, reply, T = 0, γ = 2"),
    "its interval": ("by_category.0.speedup_ci95", [8.0, 9.5], "an interval of [8, 9.5]"),
    "pays": ("verdict.pays", False, "is that the draft does not pay, its rows by prompt say"),
    "best": ("verdict.best.num_draft_tokens", 2, "say that it pays at T = 0, γ = 4"),
    "best speed": ("verdict.best.speedup", 3.0, "the card tells a speedup of 3,"),
    "break-even": ("verdict.break_even_acceptance", 0.1, "tells a break-even of 0.1"),
    "its cost": ("verdict.break_even_cost_ratio", lambda old: 2 * old, "a break-even cost of"),
    "verdict's interval": ("verdict.speedup_ci95", [2.9, 3.1], "an interval of [2.9, 3.1]"),
    "its end": ("verdict.speedup_ci95.0", None, "tells an interval of [nan, "),
    "who chose": ("verdict.chosen_on", lambda old: old - 1, "a choice by prompts of 11"),
    "who judged": ("verdict.judged_on", lambda old: old + 1, "a judgement by prompts of 13"),
    "fewer texts": ("lossless.greedy_identical", [24, 24], "compares 24 greedy texts"),
    "dtype of evidence": ("lossless.dtype", "bfloat16", "is of float32, its evidence of bfloat16"),
    "empty evidence": ("lossless.float32", {}, "names evidence in float32, and compares nothing"),
}


@pytest.fixture(scope="module")
def measured() -> Scorecard:
    return simulate({(0.0, 2): 0.7, (0.0, 4): 0.75})


@pytest.mark.parametrize("figure", FORGED)
def test_a_figure_that_is_not_that_of_the_prompts_is_named(
    measured: Scorecard, tmp_path: Path, figure: str
) -> None:
    """What is left out, cannot be, or differs from the rows by prompt."""
    assert objections(measured) == []
    path, value, words = FORGED[figure]
    file = tmp_path / "scorecard.json"
    file.write_text(json.dumps(changed(measured, path, value)), encoding="utf-8")
    assert any(words in objection for objection in objections(Scorecard.read(file)))
    for draw in (plot_all, write_report):
        with pytest.raises(InputError, match="contradicts itself, score the pair again: "):
            draw(tmp_path)


def test_counts_and_texts_that_cannot_be_are_named(measured: Scorecard) -> None:
    first, *others = measured.per_prompt
    longer = [replace(first, emitted=first.emitted + 1), *others]
    row = replace(measured.rows[0], emitted=measured.rows[0].emitted + 1)
    found = contradictions(replace(measured, per_prompt=longer, rows=[row, *measured.rows[1:]]))
    assert "calls 48 greedy texts identical to plain ones, but only 47 are as long" in found[0]
    wrong = replace(first, accepted=first.tested + 1)
    found = contradictions(replace(measured, per_prompt=[wrong, *others]))
    assert any(f"{wrong.accepted} of {first.tested} tested tokens" in each for each in found)


def test_a_card_that_distrusts_itself_is_drawn_and_does_not_pay(tmp_path: Path) -> None:
    """Its figures are those of its prompts; the verdict says what is wrong with them."""
    slow = simulate({(0.0, 2): 0.7, (0.0, 4): 0.75}, slowed=1.5)
    slow.write(tmp_path / "slow.json")
    assert sound_card(tmp_path / "slow.json").verdict.reason.startswith("These figures cannot be")
    proud = replace(slow, verdict=replace(slow.verdict, pays=True))
    proud.write(tmp_path / "proud.json")
    with pytest.raises(InputError, match="that the draft pays, and its figures cannot be trusted"):
        sound_card(tmp_path / "proud.json")


def test_a_real_card_and_one_of_before_contradict_nothing(card: Scorecard) -> None:
    """Cards were written before γ was chosen on half of the prompts."""
    assert contradictions(card) == []
    old = simulate({(0.0, 2): 0.7, (0.0, 4): 0.75})
    row = max(old.rows, key=lambda row: row.speedup)
    first = replace(
        verdict(old.rows), speedup_ci95=(math.nan, math.nan), best=Best(0.0, 4, row.speedup)
    )
    assert contradictions(replace(old, verdict=first)) == []


# Files that are no card


BROKEN: dict[str, tuple[str, object, str]] = {
    "a field of another type": ("rows.0.speedup", "fast", "rows.0.speedup"),
    "a short interval": ("rows.0.speedup_ci95", [1.0], "rows.0.speedup_ci95"),
    "zero seconds": ("per_prompt.0.seconds", 0.0, "per_prompt.0.seconds"),
    "a null hash": ("target.sha256", None, "target.sha256"),
    "NaN in words": ("lossless.distribution_p_value", "NaN", "lossless"),
    "NaN itself": ("rows.0.speedup", math.nan, "rows.0.speedup"),
    "a negative count": ("rows.0.rounds", -1, "rows.0.rounds"),
    "no rows": ("rows", [], "rows: List should have at least 1"),
    "no plain decoding": ("baseline", [], "there is no plain decoding"),
    "a huge number": ("rows.0.emitted", 10**30, "rows.0.emitted"),
    "an infinite one": ("rows.0.speedup", math.inf, "rows.0.speedup"),
    "a setting twice": ("rows", lambda rows: [*rows, rows[0]], "rows has (0.0, 2) twice"),
    "a prompt twice": ("per_prompt", lambda rows: [*rows, rows[0]], "'p0') twice"),
    "a γ of none": ("rows.0.num_draft_tokens", 0, "num_draft_tokens"),
    "too many positions": ("rows.0.acceptance_by_position", [0.5] * 3, "γ = 2 has 3 rates"),
    "more than were compared": ("lossless.greedy_identical", [9, 8], "lossless.greedy_identical"),
    "a tie that says nothing": ("lossless.ties", [{}], "lossless.ties"),
    "ties of nothing": ("lossless.ties", [{"within_rounding": True}], "more ties than greedy"),
    "lossy or not": ("verification.lossy", True, "says lossy: True"),
    "another mode": ("verification", {"mode": "tokens"}, "verification.mode"),
    "versions of another type": ("provenance.versions", [], "versions"),
    "no provenance": ("provenance", None, "provenance"),
    "an unknown field": ("rows.0.wins", 1, "rows.0.wins"),
    "half an example": ("example", {"prompt_id": "a"}, "example"),
    "a list of rows that is none": ("rows", {"a": 1}, "rows"),
    "a truth that is a number": ("verdict.pays", 1, "verdict.pays"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_is_no_card_is_refused_in_one_line(
    measured: Scorecard, tmp_path: Path, fault: str
) -> None:
    path, value, words = BROKEN[fault]
    (tmp_path / "card.json").write_text(json.dumps(changed(measured, path, value)))
    with pytest.raises(InputError, match=r"card\.json is not a complete scorecard: ") as refused:
        Scorecard.read(tmp_path / "card.json")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "[]", "null", '"a"', "{}", "\0", ""])
def test_a_file_that_is_no_json_of_ours_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(InputError, match=r"card\.json"):
        Scorecard.read(tmp_path / "card.json")


# The verdict in words


def row_of(alpha: float, gamma: int = 4, **changes: object) -> Row:
    return replace(simulate({(0.0, gamma): alpha}).rows[0], **changes)  # type: ignore[arg-type]


def test_break_even_is_where_the_speedup_is_one() -> None:
    """At the acceptance rate or the cost of a draft step that is named, the round pays exactly."""
    row = row_of(0.4, speedup=0.8, speedup_ci95=(0.75, 0.85))
    found = verdict([row])
    tokens = planned_tokens(row.acceptance_rate, 4)
    assert found.break_even_acceptance == pytest.approx(acceptance_for(tokens / 0.8, 4))
    round_in_steps = row.block_efficiency / 0.8
    rest = round_in_steps - 4 * row.cost_ratio
    assert rest + 4 * found.break_even_cost_ratio == pytest.approx(row.block_efficiency)
    at_one = verdict([replace(row, speedup=1.0, speedup_ci95=(0.9, 1.1))])
    assert at_one.break_even_acceptance == pytest.approx(row.acceptance_rate)
    assert at_one.break_even_cost_ratio == pytest.approx(row.cost_ratio)


@pytest.mark.parametrize(
    ("speedup", "cost", "words"),
    [
        (0.95, 0.1, "It would pay with an acceptance rate above {alpha:.2f}, or with a draft step"),
        (0.95, 0.1, "below {cost:.3f} of a plain step ({times:.1f} times cheaper)."),
        (0.6, 0.1, "above {alpha:.2f}; no cheaper draft alone would do."),
        (0.3, 2.0, "It would pay with a draft step below {cost:.3f} of a plain step; no acceptanc"),
        (0.3, 0.1, "Neither a free draft nor one whose every token is accepted would pay"),
    ],
)
def test_a_draft_that_does_not_pay_is_told_what_would(speedup, cost, words) -> None:
    row = row_of(0.4, speedup=speedup, speedup_ci95=(speedup - 0.02, 0.99), cost_ratio=cost)
    found = verdict([row])
    affordable = found.break_even_cost_ratio
    values = {"alpha": found.break_even_acceptance, "cost": affordable, "times": cost / affordable}
    assert words.format(**values) in found.reason
    assert not found.pays


def test_a_verdict_that_cannot_be_given_says_how_many_prompts_would_do() -> None:
    row = row_of(0.6, speedup=1.1, speedup_ci95=(0.95, 1.27), prompts=10)
    error = math.log(1.27 / 0.95) / (2 * stats.t.isf(0.025, 9))
    needed = math.ceil(10 * (2.8016 * error / math.log(1.1)) ** 2)
    reason = verdict([row]).reason
    assert reason.startswith("Whether the draft pays cannot be shown with 10 prompts: 1.10 times")
    said = int(re.search(r"About (\d+) prompts would show it\.", reason)[1])
    assert needed < said < needed + 6, "Student's t asks for a few more"
    alone = verdict([replace(row, prompts=1, speedup_ci95=(math.nan, math.nan))]).reason
    assert "with 1 prompt:" in alone
    assert "nan" not in alone
    assert "would show it" not in alone


# Scoring the same pair again


@pytest.mark.parametrize("prompts", [2, 5, 24])
def test_the_interval_covers_later_results_as_often_as_it_says(prompts: int) -> None:
    """The speedup over very many prompts of the kind; and a later score of the very same prompts,
    which only the timings' noise changes, more often still.
    """
    alphas = {(0.0, 3): 0.65}
    truth = simulate(alphas, prompts=50_000, noise=0, workload=10**6, intervals=False)
    hits = again = 0
    for i in range(100):
        row = simulate(alphas, prompts=prompts, seed=2 * i, workload=i).rows[0]
        low, high = row.speedup_ci95
        hits += low <= truth.rows[0].speedup <= high
        later = simulate(alphas, prompts=prompts, seed=2 * i + 1, workload=i, intervals=False)
        again += low <= later.rows[0].speedup <= high
    assert stats.binomtest(hits, 100, 0.94).pvalue > 1e-3, hits
    assert again >= hits
    assert again > 0.93 * 100


def test_the_words_of_a_verdict_are_written_again(measured: Scorecard, tmp_path: Path) -> None:
    """They are shown in reports, and no figure contradicts them."""
    true = measured.verdict.reason
    forged = replace(measured, verdict=replace(measured.verdict, reason="Ten times as fast."))
    forged.write(tmp_path / "card.json")
    assert sound_card(tmp_path / "card.json").verdict.reason == true
