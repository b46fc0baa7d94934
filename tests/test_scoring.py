"""The score: counts, rates and intervals against computations by hand; evidence that can fail."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.drafts import make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel, load
from specdistill.scoring import lossless, measure
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.statistics import break_even, planned_speedup, speedup_interval
from specdistill.scoring.verdict import verdict

Tiny = Callable[..., LanguageModel]
PROMPTS = [measure.EncodedPrompt(str(i), [5 + i, 9, 30 - i]) for i in range(4)]


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, ...]:
    target = load(str(tiny_folder), dtype="float32")
    folder = tmp_path_factory.mktemp("pair")
    save_draft(make_draft(target, [0, 1, 2], torch.arange(48)), folder)
    return target, load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, ...]) -> Scorecard:
    return measure.score(
        *pair, PROMPTS, num_draft_tokens=[3, 1], temperatures=[0.0, 1.0], max_new_tokens=20, seed=4
    )


def test_the_card_counts_what_the_engine_did(pair, card: Scorecard) -> None:
    target, draft = pair
    assert [(r.temperature, r.num_draft_tokens) for r in card.rows] == [
        (0.0, 1),
        (0.0, 3),
        (1.0, 1),
        (1.0, 3),
    ]
    for row in card.rows:
        decoder = SpeculativeDecoder(
            target, ModelDrafter(draft, 64), num_draft_tokens=row.num_draft_tokens
        )
        rounds, emitted = [], 0
        for prompt in PROMPTS:
            from specdistill.decoding import Request

            request = Request(prompt.id, prompt.tokens, 20, Sampling(row.temperature), 4)
            out = decoder.run([request]).outputs[0]
            rounds += out.rounds
            emitted += len(out.tokens)
        assert (row.rounds, row.emitted) == (len(rounds), emitted)
        assert row.accepted == sum(r.accepted for r in rounds)
        assert row.tested == sum(r.tested for r in rounds)
        assert row.proposed == sum(r.proposed for r in rounds)
        assert row.acceptance_rate == pytest.approx(row.accepted / row.tested)
        assert row.acceptance_per_proposal == pytest.approx(row.accepted / row.proposed)
        assert row.block_efficiency == pytest.approx(emitted / len(rounds))
        for i, conditional in enumerate(row.acceptance_by_position):
            reached = [r for r in rounds if r.tested > i]
            assert conditional == pytest.approx(sum(r.accepted > i for r in reached) / len(reached))
        assert row.survival_by_position[0] == row.acceptance_by_position[0]
        if row.temperature == 0:
            assert row.acceptance_rate_expected == pytest.approx(row.acceptance_rate)
        share = card.draft.weight_bytes / card.target.weight_bytes
        mbsu = row.block_efficiency / (share * row.num_draft_tokens + 1)
        assert row.mbsu == pytest.approx(mbsu)


def test_speeds_come_from_the_prompts(card: Scorecard) -> None:
    for row in card.rows:
        mine = [
            p
            for p in card.per_prompt
            if (p.temperature, p.num_draft_tokens) == (row.temperature, row.num_draft_tokens)
        ]
        speed = sum(p.emitted for p in mine) / sum(p.seconds for p in mine)
        plain = sum(p.baseline_emitted for p in mine) / sum(p.baseline_seconds for p in mine)
        assert row.tokens_per_second == pytest.approx(speed)
        assert row.speedup == pytest.approx(speed / plain)
        assert row.speedup_ci95[0] <= row.speedup <= row.speedup_ci95[1]
        assert sum(row.seconds.values()) == pytest.approx(sum(p.seconds for p in mine))


def test_greedy_is_identical_and_the_evidence_holds(card: Scorecard) -> None:
    assert card.lossless.greedy_identical == (8, 8)
    assert card.lossless.identity_acceptance > 0.99
    assert card.lossless.distribution_p_value > 1e-4
    assert card.lossless.holds


def test_a_card_survives_the_file(card: Scorecard, tmp_path: Path) -> None:
    card.write(tmp_path / "a" / "scorecard.json")
    assert Scorecard.read(tmp_path / "a" / "scorecard.json") == card
    unknown = dataclasses.replace(card.rows[0], speedup_ci95=(math.nan, math.nan))
    dataclasses.replace(card, rows=[unknown]).write(tmp_path / "nan.json")
    assert "NaN" not in (tmp_path / "nan.json").read_text()
    assert math.isnan(Scorecard.read(tmp_path / "nan.json").rows[0].speedup_ci95[0])
    raw = json.loads((tmp_path / "a" / "scorecard.json").read_text())
    raw["schema"] = "specdistill.scorecard/9"
    (tmp_path / "new.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="scorecard/9"):
        Scorecard.read(tmp_path / "new.json")
    (tmp_path / "half.json").write_text('{"schema": "specdistill.scorecard/1"}')
    with pytest.raises(InputError, match="not a complete"):
        Scorecard.read(tmp_path / "half.json")
    for name, text in (("no.json", None), ("bad.json", "{")):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            Scorecard.read(tmp_path / name)


def test_the_card_says_where_it_came_from(card: Scorecard) -> None:
    for key in ("device", "threads", "dtype", "versions", "git", "seed", "date", "engine"):
        assert key in card.provenance
    assert len(card.target.sha256) == 64
    assert card.target.sha256 != card.draft.sha256
    assert (card.target.vocab_size, card.draft.vocab_size) == (64, 48)


def test_a_wrong_verify_function_shows_in_the_evidence(pair, monkeypatch) -> None:
    """Accepting every proposal is caught by the distribution test and by the greedy texts."""
    target, draft = pair
    from specdistill_kernels.reference import Verdict

    def gullible(draft_tokens, draft_logits, target_logits, *, lengths, **rest):
        bonus = target_logits[:, -1].argmax(-1, keepdim=True)
        return Verdict(torch.cat([draft_tokens, bonus], 1), lengths)

    monkeypatch.setattr(lossless, "verify", gullible)
    assert lossless.distribution_p_value(target, draft, [5, 9, 30], seed=0) < 1e-6
    monkeypatch.setattr("specdistill.decoding.engine.verify", gullible)
    wrong = measure.score(
        *pair, PROMPTS, num_draft_tokens=[3], temperatures=[0.0], max_new_tokens=20
    )
    same, compared = wrong.lossless.greedy_identical
    assert same < compared
    assert any(not tie["within_rounding"] for tie in wrong.lossless.ties)
    assert not wrong.lossless.holds


def test_a_tie_is_told_from_an_error(tiny: Tiny) -> None:
    target = tiny(1, layers=2)
    prompt = [7, 8, 9]
    plain = SpeculativeDecoder(target).generate([prompt], max_new_tokens=6).outputs[0].tokens
    other = [*plain[:3], (plain[3] + 1) % 64, *plain[4:]]
    error = lossless.explain_difference(target, "a", prompt, plain, other)
    assert (error["position"], error["within_rounding"]) == (3, False)
    chosen, runner_up = target.model(torch.tensor([prompt + plain[:3]])).logits[0, -1].topk(2)[1]
    with torch.no_grad():  # make the two best tokens of that place equal: a tie by construction
        target.head.weight[runner_up] = target.head.weight[chosen]
    tie = lossless.explain_difference(target, "a", prompt, plain, other)
    assert tie["within_rounding"]


def test_planned_speedup_and_break_even_are_inverse() -> None:
    assert planned_speedup(0.8, 5, 0.1) == pytest.approx((1 - 0.8**6) / (0.2 * 1.5))
    assert planned_speedup(1.0, 3, 0.0) == 4
    alpha = break_even(4, 0.1, 1.2)
    assert sum(alpha**i for i in range(5)) == pytest.approx(1.6)
    assert break_even(4, 0.0, 1.0) == 0
    assert break_even(2, 0.9, 1.3) == 1


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """Simulated timings, true speedup 1.5: a drift shared by both runs of a prompt cancels."""
    rng = np.random.default_rng(0)
    hits, trials = 0, 200
    for trial in range(trials):
        tokens = rng.integers(20, 60, 24)
        drift = rng.uniform(0.5, 2.0, 24)
        plain = tokens * 0.05 * drift * rng.normal(1, 0.05, 24)
        fast = tokens * 0.05 / 1.5 * drift * rng.normal(1, 0.15, 24)
        low, high = speedup_interval(list(tokens), list(fast), list(tokens), list(plain), trial)
        hits += low <= 1.5 <= high
    assert stats.binomtest(hits, trials, 0.93).pvalue > 1e-3
    assert all(map(math.isnan, speedup_interval([5], [1.0], [5], [2.0], 0)))


@pytest.mark.parametrize(
    ("speedup", "interval", "words"),
    [
        (1.5, (1.3, 1.7), "The draft pays"),
        (0.8, (0.7, 0.9), "does not pay"),
        (1.1, (0.9, 1.3), "cannot be shown"),
    ],
)
def test_the_verdict_follows_the_interval(card: Scorecard, speedup, interval, words) -> None:
    row = dataclasses.replace(card.rows[0], speedup=speedup, speedup_ci95=interval)
    slow = dataclasses.replace(card.rows[1], speedup=0.1, speedup_ci95=(0.05, 0.2))
    found = verdict([slow, row])
    assert words in found.reason
    assert found.pays == (words == "The draft pays")
    assert found.best.num_draft_tokens == row.num_draft_tokens


def test_score_refuses_nothing_to_do(pair) -> None:
    with pytest.raises(InputError, match="no prompts"):
        measure.score(*pair, [], num_draft_tokens=[1], temperatures=[0.0], max_new_tokens=4)
    with pytest.raises(InputError, match="at least one"):
        measure.score(*pair, PROMPTS, num_draft_tokens=[], temperatures=[0.0], max_new_tokens=4)
