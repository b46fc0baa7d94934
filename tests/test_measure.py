"""What is timed, and what is made of it, by clocks that only the models move."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from dispatch import eager_capture
from score_checks import Cost, check_interval, check_row, score_by_clock

from specdistill.cli.tables import rows_table
from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import engine
from specdistill.decoding.records import Generation, Output, RowRound
from specdistill.drafts.making import make_draft
from specdistill.engines import transformers
from specdistill.models import LanguageModel
from specdistill.report.plots.acceptance import figure_acceptance, figure_survival
from specdistill.report.plots.speed import figure_speedup, figure_time
from specdistill.report.text import document
from specdistill.scoring import measure, turns
from specdistill.scoring.rows import PARTS, Decoded, Timed, without_stalls
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.turns import cpu_times, stolen

PROMPTS = [EncodedPrompt(str(i), [5 + i, 9, 30 - i]) for i in range(6)]


def usual(_: int, target: bool, tokens: int) -> float:
    return 1 + 0.04 * (tokens - 1) if target else 0.2


@pytest.fixture(scope="module")
def pair() -> tuple[LanguageModel, LanguageModel]:
    target = tiny_model(layers=3, dtype=torch.float64)
    return target, make_draft(target, [0, 1])


def score(
    pair: tuple[LanguageModel, LanguageModel],
    cost: Cost,
    prompts: list[EncodedPrompt] = PROMPTS,
    **more: Any,
) -> Scorecard:
    settings = {"num_draft_tokens": [1, 3], "temperature": [0.0], "max_new_tokens": 16, **more}
    return score_by_clock(pair, cost, prompts, **settings)


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, LanguageModel]) -> Scorecard:
    return score(pair, usual)


def test_plain_decoding_comes_before_and_after_a_prompts_drafts() -> None:
    assert turns.in_turn([0.0, 1.0], [2, 3, 5], 1) == [
        *((1.0, g) for g in (0, 3, 5, 2, 0)),
        *((0.0, g) for g in (0, 3, 5, 2, 0)),
    ]
    first = {turns.in_turn([0.0, 1.0], [2, 3], i)[1] for i in range(4)}
    assert first == {(0.0, 2), (1.0, 3)}, "each number starts elsewhere"


@pytest.mark.parametrize("number", [0, 40, 60, 75, 90, 160, 400])
def test_a_pass_that_stalls_changes_no_figure(pair, card: Scorecard, number: int) -> None:
    """Whichever it is: of plain decoding or of a draft, of a prompt's prefill or of a round."""

    def stalls(passes: int, target: bool, tokens: int) -> float:
        return usual(passes, target, tokens) + 1000 * (passes == number + 100)

    stalled = score(pair, stalls)
    for row, sound in zip(stalled.rows, card.rows, strict=True):
        assert row.speedup == pytest.approx(sound.speedup, rel=0.01)
        assert row.verify_ratio == pytest.approx(sound.verify_ratio, rel=0.01)
        assert row.tokens_per_second == pytest.approx(sound.tokens_per_second, rel=0.01)
    assert stalled.verdict.best.speedup == pytest.approx(card.verdict.best.speedup, rel=0.01)
    assert stalled.provenance["stalls"] > 0.3
    assert card.provenance["stalls"] == 0
    assert card.provenance["measured_again"] is None


def test_a_drift_of_the_machine_cancels(pair, card: Scorecard) -> None:
    """Each pass a little slower than the one before, four times as slow at the end."""

    def drifts(passes: int, target: bool, tokens: int) -> float:
        return usual(passes, target, tokens) * (1 + passes / 700)

    drifted = score(pair, drifts)
    for row, sound in zip(drifted.rows, card.rows, strict=True):
        assert row.speedup == pytest.approx(sound.speedup, rel=0.03)
        assert row.verify_ratio == pytest.approx(sound.verify_ratio, rel=0.03)


def test_a_slowed_temperature_is_measured_again_once(pair, card: Scorecard) -> None:
    """Slow only at first, the second measurement stands; slow for good, there is no speedup."""

    def slow(until: float, counted: list[int]) -> Cost:
        def cost(passes: int, target: bool, tokens: int) -> float:
            counted.append(passes)
            return usual(passes, target, tokens) * (1.3 if tokens == 1 and passes < until else 1)

        return cost

    sound, once, twice = [], [], []
    card = score(pair, slow(0, sound))
    mended = score(pair, slow(len(sound) - 100, once))
    assert mended.provenance["measured_again"] == 0.0
    for row, other in zip(mended.rows, card.rows, strict=True):
        assert row.speedup == pytest.approx(other.speedup)
    assert mended.verdict.best.speedup == pytest.approx(card.verdict.best.speedup)
    wrong = score(pair, slow(math.inf, twice))
    assert len(once) == len(twice) < 2.1 * len(sound), "and no third time"
    assert not wrong.verdict.pays
    assert math.isnan(wrong.verdict.best.speedup)
    assert "plain step, also when it was measured again; a verify pass does" in wrong.verdict.reason
    assert "times plain decoding" not in wrong.verdict.reason
    table = rows_table(wrong)
    assert "plain slowed: a verify pass does all" in str(table.caption)
    assert "plain slowed" in list(table.columns[6].cells)
    assert rows_table(card).caption is None


def test_other_temperatures_keep_their_first_measurement(pair) -> None:
    """Only where the fastest setting cannot be as fast as it seems is anything decoded again."""
    asked: list[tuple[float, int]] = []
    real = turns.in_turn

    def noted(temperatures, gammas, number):  # type: ignore[no-untyped-def]
        found = real(temperatures, gammas, number)
        asked.extend(found)
        return found

    def slow(passes: int, target: bool, tokens: int) -> float:
        return usual(passes, target, tokens) * (1.3 if tokens == 1 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "in_turn", noted)
        card = score(pair, slow, temperature=[0.0, 1.0])
    again = card.provenance["measured_again"]
    assert again in (0.0, 1.0)
    assert len(asked) == len(PROMPTS) * (8 + 4)
    assert {t for t, _ in asked[-len(PROMPTS) * 4 :]} == {again}


# Small inputs


def test_answers_of_one_token_leave_nothing_to_propose(pair, tmp_path: Path) -> None:
    for settings in ({}, {"temperature": [1.0]}, {"prompts": PROMPTS[:1]}):
        card = score(pair, usual, **{"max_new_tokens": 1, **settings})
        assert {row.proposed for row in card.rows} == {0}
        assert math.isnan(card.rows[0].acceptance_rate)
        assert not card.verdict.pays
        assert card.verdict.reason.startswith(
            "Whether the draft pays cannot be shown: no draft token was tested"
        )
        assert "nan" not in card.verdict.reason
        card.write(tmp_path / "card.json")
        assert Scorecard.read(tmp_path / "card.json").rows[0].proposed == 0
        cells = [str(cell) for column in rows_table(card).columns for cell in column.cells]
        assert not any("nan" in cell for cell in cells)
        text = document(card, None, [], "", "my/target", tmp_path)
        assert "**Whether the draft pays cannot be shown: " in text
        assert "nan" not in text
        figure_survival({"a": card})
        for figure in (figure_speedup, figure_time, figure_acceptance):
            figure(card)


def test_answers_of_one_token_by_transformers(tmp_path: Path) -> None:
    from specdistill.drafts.making import save_draft
    from specdistill.models import load

    save_draft(tiny_model(1), tmp_path / "target")
    save_draft(make_draft(tiny_model(1), [0]), tmp_path / "draft")
    both = [load(str(tmp_path / name), dtype="float32") for name in ("target", "draft")]
    card = transformers.score(
        *both, PROMPTS[:2], num_draft_tokens=[2], temperature=[0.0, 1.0], max_new_tokens=1
    )
    assert card.rows[0].emitted == 2
    assert "nan" not in card.verdict.reason


@pytest.mark.parametrize("count", [1, 2, 3])
def test_answers_that_end_at_once_and_few_prompts(pair, count: int, monkeypatch) -> None:
    monkeypatch.setattr(LanguageModel, "eos_ids", frozenset(range(64)))
    card = score(pair, usual, temperature=[0.0, 1.0], prompts=PROMPTS[:count])
    assert {p.emitted for p in card.per_prompt} == {1}
    assert not card.verdict.pays
    assert "nan" not in card.verdict.reason


def test_a_run_that_had_to_capture_is_not_timed(pair, monkeypatch) -> None:
    timed: list[Timed] = []

    def watched(answers: Any) -> Any:
        timed.extend(run for runs in answers.values() for each in runs for run in each)
        return without_stalls(answers)

    monkeypatch.setattr(measure.rows_of, "without_stalls", watched)
    monkeypatch.setattr(engine, "CAPTURING", "cpu")
    longer = EncodedPrompt("longer", [7] * 150)  # more slots are seen than in the run that warms up
    with eager_capture() as capture:
        score(pair, usual, [*PROMPTS, longer])
    assert capture.captures > 0
    assert len(timed) > 3 * 7
    assert not any(run.generation.captures for run in timed)


def test_a_clock_that_stands_still_gives_no_speed(pair) -> None:
    card = score(pair, lambda *_: 0.0)
    assert math.isnan(card.rows[0].speedup)
    assert not card.verdict.pays


# From runs to rows


def run_of(
    rounds: list[dict[str, float]], wall: float = 0.0, loop: float = 0.0, tokens: int = 1
) -> Timed:
    output = Output("p", [1] * tokens * len(rounds), [RowRound("p", [1] * tokens, 1, 1, 0, False)])
    spent = sum(sum(r.values()) for r in rounds)
    return Timed(Generation([output], {}, len(rounds), 0, None, rounds), wall or spent + loop)


def round_of(target: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(PARTS[:-1], 0.0), "target": target, **others}


def test_plain_runs_of_a_prompt_count_as_their_mean() -> None:
    one, other = ([round_of(step) for _ in range(4)] for step in (1.0, 2.0))
    runs, stalls = without_stalls({(0.0, 0): [[run_of(one, loop=0.4), run_of(other, loop=0.6)]]})
    (plain,) = runs[0.0, 0]
    counts = plain.counts
    assert counts.parts == dict.fromkeys(PARTS, 0.0) | {"target": 6.0, "loop": pytest.approx(0.5)}
    assert (len(counts.tokens), counts.rounds, stalls) == (4, 4, 0)


def seconds_of(runs: list[Decoded]) -> list[float]:
    return [each.counts.seconds for each in runs]


def test_a_stalled_round_counts_as_the_usual_one() -> None:
    """Also where a run is too short to tell: beside the others of its setting."""
    steps = [round_of(1.0, verify=0.1) for _ in range(5)]
    late = [*steps[:2], round_of(1.0, verify=900.0), *steps[3:]]
    settings = {(0.0, 3): [[run_of(late)], [run_of(steps)], [run_of([round_of(700.0)])]]}
    runs, stalls = without_stalls(settings)
    assert seconds_of(runs[0.0, 3]) == pytest.approx([5.5, 5.5, 1.1])
    assert stalls == pytest.approx(1 - 12.1 / (904.5 + 1 + 5.5 + 700), rel=1e-3)
    twice = [round_of(1.0), round_of(2.9), round_of(1.0), round_of(1.1)]
    runs, stalls = without_stalls({(0.0, 3): [[run_of(twice)]]})
    assert (seconds_of(runs[0.0, 3]), stalls) == ([6.0], 0), "no stall, but noise"


def test_a_row_of_known_times() -> None:
    check_row()


def test_an_interval_of_known_width() -> None:
    check_interval()


# Steal


def test_steal_is_a_share_of_the_processors_time(tmp_path: Path, monkeypatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 5 50 800 20 3 2 20 7 0\ncpu0 1 2 3\n")
    assert cpu_times(stat) == (20, 1000)
    monkeypatch.setattr("specdistill.scoring.turns.cpu_times", lambda: (50, 1200))
    assert stolen((20, 1000)) == pytest.approx(0.15)
    assert stolen(None) is None
    for text in ("", "cpu 1 2 3 4\n", "intr 5\n", "cpu a b c d e f g h\n"):
        stat.write_text(text)
        assert cpu_times(stat) is None
    assert cpu_times(tmp_path / "none") is None


def test_the_card_tells_steal(card: Scorecard) -> None:
    steal = card.provenance["steal"]
    assert steal is None or 0 <= steal <= 1
    older = replace(card, provenance={k: v for k, v in card.provenance.items() if k != "steal"})
    assert older.label == card.label
