"""The best of many settings is not believed on the prompts that chose it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cards import simulate
from scipy import stats
from score_checks import check_choice

from specdistill.cli.tables import before_after_table, rows_table
from specdistill.errors import InputError
from specdistill.report.page import _figures
from specdistill.report.plots.speed import figure_speedup
from specdistill.report.text import document
from specdistill.scoring import comparable
from specdistill.scoring.card_rows import PromptRow, Row
from specdistill.scoring.choice import choose, chosen
from specdistill.scoring.compare import compare
from specdistill.scoring.verdict import verdict


def rows_worth(
    speedup: float,
    rng: np.random.Generator,
    prompts: int,
    gammas: int = 8,
    spread: float = 0.03,
    shared: float = 0.04,
) -> list[PromptRow]:
    """Two temperatures, several γ, all worth the same. A prompt's plain time is disturbed once at
    each temperature; its drafts in common and each on its own (`spread`), with heavy tails.
    """

    def noise(size: float) -> np.ndarray:
        return np.exp(size * rng.standard_t(3, prompts))

    tokens = rng.integers(30, 130, prompts)
    easier = np.exp(rng.normal(0, shared, prompts))
    rows = []
    for temperature in (0.0, 1.0):
        plain = tokens * 0.05 * noise(0.03)
        for gamma in range(1, gammas + 1):
            seconds = tokens * 0.05 / speedup / easier * noise(0.03) * noise(spread)
            rows += [
                PromptRow(
                    prompt_id=f"p{i}",
                    temperature=temperature,
                    num_draft_tokens=gamma,
                    emitted=int(tokens[i]),
                    rounds=int(tokens[i]) // 2,
                    seconds=float(seconds[i]),
                    baseline_seconds=float(plain[i]),
                    baseline_emitted=int(tokens[i]),
                )
                for i in range(prompts)
            ]
    return rows


def naive(rows: list[PromptRow]) -> float:
    """The lower end of the fastest setting's own interval."""
    settings = {(row.temperature, row.num_draft_tokens) for row in rows}
    each = [choose([r for r in rows if (r.temperature, r.num_draft_tokens) == s]) for s in settings]
    return max(each, key=lambda c: c.speedup.value).speedup.low


@pytest.mark.parametrize(
    ("prompts", "gammas"), [(4, 3), (6, 3), (6, 8), (8, 8), (12, 3), (16, 8), (32, 8)]
)
def test_a_draft_worth_nothing_seldom_pays(prompts: int, gammas: int) -> None:
    trials = 250
    paid = 0
    for trial in range(trials):
        rng = np.random.default_rng([prompts, gammas, trial])
        paid += choose(rows_worth(1.0, rng, prompts, gammas)).speedup.low > 1
    assert stats.binomtest(paid, trials, 0.05, alternative="greater").pvalue > 0.05, paid


def test_on_its_own_prompts_the_best_of_many_would_pay_too_often() -> None:
    """What the choice by halves is for."""
    rng = np.random.default_rng(5)
    paid = sum(naive(rows_worth(1.0, rng, 8)) > 1 for _ in range(60))
    assert paid > 0.1 * 60, paid


def test_a_draft_worth_something_still_pays() -> None:
    rng = np.random.default_rng(6)
    rows = [rows_worth(1.3, rng, 16, spread=0.06, shared=0.2) for _ in range(50)]
    found = [choose(each).speedup for each in rows]
    assert sum(speedup.low > 1 for speedup in found) > 0.75 * 50
    assert np.mean([np.log(speedup.value) for speedup in found]) == pytest.approx(
        np.log(1.3), abs=0.03
    ), "neither more nor less than it is worth"
    few = [choose(rows_worth(1.9, rng, 6, gammas=3)).speedup.low > 1 for _ in range(20)]
    assert sum(few) >= 19, "as many prompts as quickstart has"


def test_each_half_is_judged_at_what_the_other_chose() -> None:
    """A γ that is fast on one half alone is not what that half is judged at."""
    rows = rows_worth(1.0, np.random.default_rng(0), 7, gammas=2)
    rows = [row for row in rows if row.temperature == 0]
    ones = choose(rows)
    assert (ones.chosen_on, ones.judged_on) == (3, 4)
    at = {row.prompt_id: row.num_draft_tokens for row in ones.rows}
    assert list(at) == [f"p{i}" for i in range(7)], "every prompt once, in its order"
    for lucky in at:  # made very fast at γ = 1: every prompt of the other half goes there
        changed = [
            replace(row, seconds=row.seconds / 1e4, rounds=1)
            if (row.prompt_id, row.num_draft_tokens) == (lucky, 1)
            else replace(row, seconds=row.seconds * (1 if row.num_draft_tokens == 2 else 1.5))
            for row in rows
        ]
        changed = [
            replace(row, emitted=row.emitted * 1000) if row.rounds == 1 else row for row in changed
        ]
        after = {r.prompt_id: r.num_draft_tokens for r in choose(changed).rows}
        assert after[lucky] == 2, "its own luck does not choose for it"
        assert sorted(after.values()).count(1) in (3, 4)
    assert choose(list(reversed(rows))).setting == ones.setting
    assert {r.prompt_id: r.num_draft_tokens for r in choose(list(reversed(rows))).rows} == at


def test_the_best_by_chance_is_worth_nothing() -> None:
    check_choice()


def test_where_there_is_nothing_to_choose_all_prompts_judge() -> None:
    rows = rows_worth(1.2, np.random.default_rng(1), 5, gammas=1)
    one = choose([row for row in rows if row.temperature == 0])
    assert (one.chosen_on, one.judged_on, one.words, one.wider) == (0, 0, "", 1.0)
    alone = choose([row for row in rows if row.prompt_id == "p3"])
    assert np.isnan(alone.speedup.low)
    with pytest.raises(InputError, match="no prompt was decoded in every setting"):
        choose([])
    assert chosen(1, 2) == "γ chosen on 1 prompt, judged on 2 others, and the other way round"
    assert chosen(1, 1) == "γ chosen on 1 prompt, judged on 1 other, and the other way round"


def test_the_verdict_tells_the_speedup_of_the_choice() -> None:
    card = simulate({(0.0, g): 0.6 + g / 100 for g in (2, 3, 4)}, prompts=9)
    found = verdict(card.rows, per_prompt=card.per_prompt)
    how = choose(card.per_prompt)
    fastest = max(card.rows, key=lambda row: row.speedup)
    assert how.setting == (fastest.temperature, fastest.num_draft_tokens)
    assert (found.best.temperature, found.best.num_draft_tokens) == how.setting
    assert (found.best.speedup, *found.speedup_ci95) == how.speedup
    assert (found.chosen_on, found.judged_on) == (4, 5)
    assert "(γ chosen on 4 prompts, judged on 5 others, and the other way round)" in found.reason
    best = card.best_row(0.0)
    assert (best.num_draft_tokens, best.speedup) == (how.setting[1], how.speedup.value)


def test_a_comparison_judges_either_draft_by_the_choice() -> None:
    """Of two drafts worth the same neither is faster more often than by chance."""
    cards = {
        name: simulate({(0.0, g): 0.6 for g in (2, 3)}, prompts=8, seed=seed, draft=name)
        for seed, name in enumerate("ab")
    }
    (difference,) = compare(cards).differences
    worth = {name: choose(card.per_prompt).speedup.value for name, card in cards.items()}
    assert difference.ratio == pytest.approx(worth[difference.faster] / worth[difference.slower])
    assert difference.ratio >= 1


# A verify pass that took less time than a plain step


def slow_row(verify_ratio: float) -> Row:
    row = simulate({(0.0, 3): 0.8}).rows[0]
    return replace(row, speedup=2.43, speedup_ci95=(1.72, 3.44), verify_ratio=verify_ratio)


def test_a_slowed_baseline_has_no_speedup() -> None:
    assert verdict([slow_row(0.96)]).pays
    found = verdict([slow_row(0.81)])
    assert not found.pays
    assert np.isnan([found.best.speedup, *found.speedup_ci95]).all()
    assert "2.43" not in found.reason
    assert found.reason.startswith(
        "These figures cannot be trusted: T = 0, γ = 3: a verify pass took 0.81 of a plain step;"
    )
    again = verdict([slow_row(0.81)], measured_again=0.0).reason
    assert "0.81 of a plain step, also when it was measured again;" in again
    assert "again" not in verdict([slow_row(0.81)], measured_again=1.0).reason


def test_a_slowed_card_shows_its_speedup_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in tables, not in the report, not in a picture, and no comparison has it."""
    sound = simulate({(0.0, 3): 0.8, (1.0, 3): 0.5})
    rows = [replace(row, speedup=2.4321, speedup_ci95=(1.72, 3.44)) for row in sound.rows[:1]]
    rows = [replace(row, verify_ratio=0.9) for row in rows] + sound.rows[1:]
    card = replace(sound, rows=rows, verdict=verdict(rows))
    assert np.isnan(card.best_row(0.0).speedup)
    assert card.slices("by_category") == []
    assert sound.slices("by_category")
    text = document(card, None, [], "", "my/target", tmp_path)
    assert "**Whether the draft pays cannot be shown: the measurement is wrong" in text
    assert "| plain slowed |" in text
    assert "- **Plain slowed**: a verify pass does all" in text
    assert "2.43" not in text
    assert "2.43" not in " ".join(figure.value for figure in _figures(card))
    for table in (rows_table(card), before_after_table(card, card)):
        cells = [str(cell) for column in table.columns for cell in column.cells]
        assert "plain slowed" in cells
        assert not any("2.43" in cell for cell in cells)
        assert "v < 0.95" in str(table.caption)
    drawn = [
        value
        for axes in figure_speedup(card).axes
        for line in axes.lines
        for value in np.asarray(line.get_ydata(), dtype=float)
    ]
    assert not any(abs(value - 2.4321) < 1e-6 for value in drawn)
    slow = replace(sound, rows=[replace(sound.rows[0], verify_ratio=0.9), *sound.rows[1:]])
    monkeypatch.setattr(comparable, "objections", lambda _: [])  # its rows by prompt are sound
    (why,) = comparable.obstacles({"a": slow, "b": sound})
    assert why.startswith("a: T = 0, γ = 3: a verify pass took 0.90 of a plain step; a verify pass")
