"""Can a score be trusted? Known answers by a clock that only the models move, and tampering."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cards import simulate
from conftest import tiny_model
from scipy import stats

from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder, engine
from specdistill.decoding.cache import CachedModel
from specdistill.drafts import make_draft, save_draft
from specdistill.models import LanguageModel, load
from specdistill.scoring import lossless, measure
from specdistill.scoring.scorecard import Row, Scorecard
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.statistics import acceptance_for, planned_tokens
from specdistill.scoring.trust import doubts
from specdistill.scoring.verdict import verdict

PROMPTS = [
    measure.EncodedPrompt(str(i), [5 + i, 9, 30 - i], ("short", "long")[i % 2]) for i in range(6)
]
STEP, EXTRA, DRAFT_STEP = 1.0, 0.04, 0.2  # of a plain step, each further token in a pass, a draft's


class Clock:
    """Seconds pass only while a model runs. `slowed` makes passes over one token take longer."""

    def __init__(self, target: LanguageModel, slowed: float) -> None:
        self.target = target
        self.slowed = slowed
        self.now = 0.0

    def run(self, model: LanguageModel, num_tokens: int) -> None:
        if model is not self.target:
            self.now += DRAFT_STEP
        elif num_tokens == 1:
            self.now += STEP * self.slowed
        else:
            self.now += STEP + EXTRA * (num_tokens - 1)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, ...]:
    target = load(str(tiny_folder), dtype="float64")
    folder = tmp_path_factory.mktemp("pair")
    save_draft(make_draft(target, [0, 1, 2]), folder)
    return target, load(str(folder), dtype="float64")


def score(pair: tuple[LanguageModel, ...], slowed: float, temperatures: list[float]) -> Scorecard:
    """A card by the clock."""
    clock = Clock(pair[0], slowed)
    stopped = SimpleNamespace(perf_counter=lambda: clock.now)
    real = CachedModel.run

    def run(self, tokens, *rest, **more):  # type: ignore[no-untyped-def]
        clock.run(self.model, tokens.shape[1])
        return real(self, tokens, *rest, **more)

    settings = {"num_draft_tokens": [1, 4], "temperatures": temperatures, "max_new_tokens": 25}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", stopped)
        patch.setattr(engine, "time", stopped)
        patch.setattr(CachedModel, "run", run)
        patch.setattr(lossless, "distribution_p_value", lambda *_, **__: 0.5)  # slow, and no timing
        return measure.score(*pair, PROMPTS, **settings)


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, ...]) -> Scorecard:
    return score(pair, 1.0, [0.0, 1.0])


# The target as its own draft


def test_the_target_as_its_own_draft_accepts_everything(monkeypatch) -> None:
    """α = 1 and τ = γ + 1; of rounds that an answer's end cuts short, those that it does not."""
    monkeypatch.setattr(LanguageModel, "eos_ids", frozenset())
    target = tiny_model(dtype=torch.float64)
    card = measure.score(
        target, target, PROMPTS, num_draft_tokens=[1, 4], temperatures=[0.0, 1.0], max_new_tokens=20
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
    assert [(row.temperature, row.num_draft_tokens) for row in card.rows] == [
        (0, 1),
        (0, 4),
        (1, 1),
        (1, 4),
    ]
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


def test_a_card_with_categories_survives_the_file(card: Scorecard, tmp_path: Path) -> None:
    card.write(tmp_path / "card.json")
    assert Scorecard.read(tmp_path / "card.json") == card


def test_a_slowed_baseline_does_not_pay(pair, card: Scorecard) -> None:
    slow = score(pair, 2.5, [0.0])
    assert slow.rows[1].speedup > 2 * card.rows[1].speedup
    assert not slow.verdict.pays
    assert slow.verdict.reason.startswith("These figures cannot be trusted: T = 0, γ = 1: a round ")
    assert "plain decoding was slowed down" in slow.verdict.reason
    assert "cannot be trusted" not in card.verdict.reason


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
