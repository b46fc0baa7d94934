"""The pictures show what the card says, in any shape a card can have."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cards import simulate
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from specdistill.errors import InputError, StorageError
from specdistill.quoting import visible
from specdistill.report.plots import (
    figure_acceptance,
    figure_runs,
    figure_speedup,
    figure_survival,
    figure_sweep,
    figure_text,
    figure_time,
    figure_training,
    plot_all,
    plot_together,
    read_metrics,
    save,
)
from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.card_rows import DecodedText, Kind, ModelCard, Row
from specdistill.scoring.scorecard import Scorecard, Verification

GAMMAS = (1, 2, 3, 4, 6)


@pytest.fixture(autouse=True)
def any_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards here are drawn, not measured: what they say in sum has no rows by prompt behind it.
    That such a card is refused is tested in test_trust.py.
    """
    believe_cards(monkeypatch)


def believe_cards(patch: pytest.MonkeyPatch) -> None:
    for module in ("report.plots", "report"):
        patch.setattr(f"specdistill.{module}.sound_card", Scorecard.read)


def make_card(alphas: Mapping[float, float], gammas: Sequence[int] = GAMMAS) -> Scorecard:
    """Of a trimmed draft, by its α at every temperature; two greedy texts part at ties."""
    card = simulate({(t, g): alphas[t] for t in alphas for g in gammas}, prompts=48, seed=17)
    return replace(
        card,
        target=ModelCard("demo:smollm2", 134_515_008, 269_030_016, "bfloat16", 49152, "ab" * 32),
        draft=ModelCard("runs/a/draft", 36_912_384, 19_500_000, "bfloat16", 2048, "cd" * 32),
        provenance=card.provenance | {"git": "0123abc"},
        rows=[
            replace(row, acceptance_rate_expected=row.acceptance_rate + 0.012 * row.temperature)
            for row in card.rows
        ],
        lossless=Lossless(
            (46, 48),
            [
                {"prompt_id": "p7", "position": 31, "top_two_gap": 0.0012, "within_rounding": True},
                {"prompt_id": "p9", "position": 4, "top_two_gap": 0.0007, "within_rounding": True},
            ],
            0.9991,
            0.4312,
        ),
        per_prompt=card.per_prompt[:1],
        by_category=[],
    )


@cache
def make_after() -> Scorecard:
    return make_card({0.0: 0.7, 1.0: 0.58})


@cache
def make_before() -> Scorecard:
    return make_card({0.0: 0.02, 1.0: 0.01}, GAMMAS[:1])


def make_metrics() -> list[dict[str, Any]]:
    """Ten logged steps, two of them followed by a held-out evaluation."""
    rows: list[dict[str, Any]] = []
    for step in range(1, 11):
        rows.append({"tokens": 13400 * step, "seconds": 12.04 * step, "loss": 0.8 + 3 / step})
        if step % 5 == 0:
            held_out = {"expected_alpha": 0.057 * step, "greedy_match": 0.063 * step}
            rows.append({"tokens": 13400 * step, "seconds": 12.04 * step, **held_out})
    return rows


def make_decoded() -> list[dict[str, Any]]:
    """The same with a decode at each evaluation, and the row that ends a run."""
    rows = make_metrics()
    for row in rows:
        row["step"] = row["tokens"] // 13400
        if "expected_alpha" in row:
            row |= {"block_efficiency": 3 - 0.1 * row["step"], "num_draft_tokens": 4}
    last = {key: value for key, value in rows[5].items() if key != "loss"}
    return [*rows, last | {"tokens": 134000, "step": 10, "kept_step": 5}]


def unmeasured(row: Row) -> Row:
    """The row of a setting in which no token was emitted."""
    return replace(
        row,
        emitted=0,
        acceptance_rate=math.nan,
        acceptance_rate_expected=math.nan,
        acceptance_by_position=[],
        survival_by_position=[],
        speedup=math.nan,
        speedup_ci95=(math.nan, math.nan),
        predicted_speedup=math.nan,
        planned_speedup=math.nan,
        seconds={},
    )


def data(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    line: Any
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def texts(figure: Figure) -> Iterator[Text]:
    """All words a reader sees, once the layout is settled."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text() and text.get_visible():
            yield text


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


AFTER = make_after()
WITHOUT_ROWS = replace(AFTER, rows=[], baseline=[])
HALF_MEASURED = replace(
    AFTER, rows=[row if row.temperature == 0 else unmeasured(row) for row in AFTER.rows]
)
ONE_ROW = make_card({0.0: 0.63}, GAMMAS[:1])
TEMPERATURES = (0.0, 0.3, 0.7, 1.0)
MANY = make_card(dict.fromkeys(TEMPERATURES, 0.5))
EARLY = replace(
    AFTER,
    rows=[replace(r, least_reach=0.1) if r.num_draft_tokens == 6 else r for r in AFTER.rows],
)
CARDS = {
    "usual": AFTER,
    "one stops early": EARLY,
    "one row": ONE_ROW,
    "four temperatures": MANY,
    "half unmeasured": HALF_MEASURED,
    "no rows": WITHOUT_ROWS,
}


SWEEP = [
    ("fkl", "fixed", 0.41),
    ("fkl", "draft", 0.52),
    ("tvd, a long name", "fixed", math.nan),
    ("rkl", "draft", 0.6),
]
KINDS: list[Kind] = ["accepted", "residual", "bonus"]
EXAMPLE = DecodedText(
    "p1", 0.0, 4, [(f" word{i}" + "\n" * (i % 40 == 39), KINDS[i % 3]) for i in range(90)]
)


FIGURES = {
    **{
        f"acceptance, {name}": (figure_acceptance, card, make_before())
        for name, card in CARDS.items()
    },
    **{f"speedup, {name}": (figure_speedup, card) for name, card in CARDS.items()},
    **{f"time, {name}": (figure_time, card) for name, card in CARDS.items()},
    "acceptance without before": (figure_acceptance, AFTER),
    "training": (figure_training, make_metrics()),
    "training, decoded": (figure_training, make_decoded()),
    "training, one step": (figure_training, make_metrics()[:1]),
    "training, no step": (figure_training, []),
    **{
        f"survival, {name}": (figure_survival, {"this draft": card, "before": make_before()})
        for name, card in CARDS.items()
    },
    "runs": (figure_runs, {"a": make_metrics(), "b": make_metrics()[3:]}),
    "runs, nothing logged": (figure_runs, {"a": []}),
    "sweep": (figure_sweep, SWEEP, "expected α"),
    "sweep, one": (figure_sweep, [("fkl", "target", 0.5)], "expected α"),
    "sweep, unmeasured": (figure_sweep, [("fkl", "target", math.nan)], "expected α"),
    "text": (figure_text, EXAMPLE),
    "text, empty": (figure_text, replace(EXAMPLE, pieces=[])),
}


@pytest.mark.parametrize("case", FIGURES.values(), ids=FIGURES.keys())
def test_every_picture_is_legible(case: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of empty limits and crushed layouts
        draw, *arguments = case
        figure = draw(*arguments)
        page = figure.bbox
        for text in texts(figure):
            assert float(text.get_fontsize()) >= 9, text
            box = text.get_window_extent()
            inside = page.x0 <= box.x0 and box.x1 <= page.x1
            inside = inside and page.y0 <= box.y0 and box.y1 <= page.y1
            # A tick beyond the end of its axis is not drawn, but keeps its text.
            is_tick = text.get_text().replace(".", "").rstrip("km").isdigit()
            assert inside or is_tick, f"{text} is cut off"


def test_acceptance_shows_the_card() -> None:
    left, right = figure_acceptance(AFTER).axes
    for temperature in (0.0, 1.0):
        rows = [row for row in AFTER.rows if row.temperature == temperature]
        gammas = [row.num_draft_tokens for row in rows]
        name = f"T = {temperature:g}"
        assert data(left, name) == (gammas, [row.acceptance_rate for row in rows])
        expected = [row.acceptance_rate_expected for row in rows]
        assert data(left, f"expected, {name}") == (gammas, expected)
        positions = [1, 2, 3, 4, 5, 6]  # of the largest γ only
        given, survived = rows[-1].acceptance_by_position, rows[-1].survival_by_position
        assert data(right, f"given earlier, {name}") == (positions, given)
        assert data(right, f"all rounds, {name}") == (positions, survived)


def test_acceptance_before_distillation_is_grey_and_explained() -> None:
    before = make_before()
    figure = figure_acceptance(AFTER, before)
    left = figure.axes[0]
    assert data(left, "before, T = 0") == ([1], [before.rows[0].acceptance_rate])
    colours = {line.get_label(): line.get_color() for line in left.get_lines()}
    assert colours["before, T = 0"] == colours["before, T = 1"] == "#767676"
    assert len({colours["T = 0"], colours["T = 1"], "#767676"}) == 3
    assert "before distillation" in words(figure)
    assert "before distillation" not in words(figure_acceptance(AFTER))


def test_speedup_shows_the_card() -> None:
    figure = figure_speedup(AFTER)
    assert "plain\ndecoding" in words(figure)
    for axes, temperature in zip(figure.axes, (0.0, 1.0), strict=True):
        rows = [row for row in AFTER.rows if row.temperature == temperature]
        gammas = [row.num_draft_tokens for row in rows]
        assert data(axes, "measured") == (gammas, [row.speedup for row in rows])
        assert data(axes, "predicted") == (gammas, [row.predicted_speedup for row in rows])
        assert data(axes, "planned") == (gammas, [row.planned_speedup for row in rows])
        assert data(axes, "plain decoding")[1] == [1.0, 1.0]
        (intervals,) = [part for part in axes.collections if isinstance(part, LineCollection)]
        ends = [tuple(segment[:, 1]) for segment in intervals.get_segments()]
        assert ends == [row.speedup_ci95 for row in rows]


def test_a_row_that_stops_early_is_no_point_of_the_line() -> None:
    axes = figure_speedup(EARLY).axes[0]
    lines = [line for line in axes.get_lines() if line.get_label() == "measured"]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3, 4], [6]]
    assert [line.get_markerfacecolor() == "white" for line in lines] == [False, True]
    left, right = figure_acceptance(EARLY).axes
    rates = [list(line.get_xdata()) for line in left.get_lines() if line.get_label() == "T = 0"]
    assert rates == [[1, 2, 3, 4], [6]]
    assert len(data(right, "all rounds, T = 0")[0]) == 4, "of the largest fixed γ"
    survival = figure_survival({"this draft": EARLY})
    assert len(data(survival.axes[0], "this draft")[0]) == 5
    assert "this draft, γ = 4" in words(survival)
    for draw in (figure_speedup, figure_acceptance):
        assert "γ at most, stops early" in words(draw(EARLY))
        assert "γ at most, stops early" not in words(draw(AFTER))
    names = [label.get_text() for label in figure_time(EARLY).axes[0].get_yticklabels()]
    assert names[-1] == "γ ≤ 6"


def test_an_interval_that_leaves_the_estimate_out_is_drawn() -> None:
    rows = [replace(row, speedup_ci95=(row.speedup + 0.1, row.speedup + 0.2)) for row in AFTER.rows]
    assert figure_speedup(replace(AFTER, rows=rows)).axes


def test_temperatures_may_have_different_gammas() -> None:
    rows = [row for row in AFTER.rows if row.temperature == 0 or row.num_draft_tokens == 2]
    card = replace(AFTER, rows=rows)
    greedy, sampled = figure_time(card).axes
    names = ["plain", "γ = 1", "γ = 2", "γ = 3", "γ = 4", "γ = 6"]
    assert [label.get_text() for label in greedy.get_yticklabels()] == names
    assert [label.get_text() for label in sampled.get_yticklabels()] == ["plain", "γ = 2"]
    for axes in figure_speedup(card).axes:
        low, high = axes.get_xlim()
        assert low < 1
        assert high > 6


def test_time_bars_add_up_to_the_time_per_token() -> None:
    for axes, base in zip(figure_time(AFTER).axes, AFTER.baseline, strict=True):
        rows = [row for row in AFTER.rows if row.temperature == base.temperature]
        plain, *parts = axes.containers
        assert plain[0].get_width() == pytest.approx(1000 / base.tokens_per_second)
        names = ["prompt", "draft steps", "verify pass"]
        assert [part.get_label() for part in parts] == names
        for index, row in enumerate(rows):
            end = 0.0
            for bars, seconds in zip(parts, row.seconds.values(), strict=True):
                assert bars[index].get_x() == pytest.approx(end)
                assert bars[index].get_width() == pytest.approx(1000 * seconds / row.emitted)
                end = bars[index].get_x() + bars[index].get_width()


def test_every_part_of_the_time_is_told_from_the_others_without_colour() -> None:
    parts = ("loop", "prefill", "draft", "target", "verify", "other")
    rows = [replace(row, seconds=dict.fromkeys(parts, 1.0)) for row in AFTER.rows]
    figure = figure_time(replace(AFTER, rows=rows))
    names = ["prompt", "draft steps", "verify pass", "verify function", "rest of the round"]
    names.append("between rounds")
    _, *bars = figure.axes[0].containers
    assert [part.get_label() for part in bars] == names
    assert set(names) <= set(words(figure))
    looks = [(part[0].get_hatch(), round(luminance(part[0].get_facecolor()), 1)) for part in bars]
    assert len(set(looks)) == len(parts)


def test_time_shows_a_part_it_has_no_name_for() -> None:
    rows = [replace(row, seconds={**row.seconds, "network": 3.0}) for row in AFTER.rows]
    figure = figure_time(replace(AFTER, rows=rows))
    assert "network" in words(figure)
    assert figure.axes[0].containers[-1].get_label() == "network"


def luminance(colour: tuple[float, ...]) -> float:
    """As a grey printer sees it."""
    red, green, blue = colour[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_survival_shows_every_draft_and_independence() -> None:
    figure = figure_survival({"after": AFTER, "before": make_before()})
    for axes, temperature in zip(figure.axes, (0.0, 1.0), strict=True):
        (*_, row) = [row for row in AFTER.rows if row.temperature == temperature]
        places = list(range(7))
        assert data(axes, "after") == (places, [1.0, *row.survival_by_position])
        assert data(axes, "αⁱ, after")[1] == [row.acceptance_rate**i for i in places]
        assert data(axes, "before")[0] == [0, 1]
    drawn = figure.axes[0].get_lines()
    looks = {line.get_label(): (line.get_marker(), line.get_linestyle()) for line in drawn}
    assert looks["after"] != looks["before"], "told apart without colour"


def test_runs_show_alpha_and_the_tokens_it_would_emit() -> None:
    left, right = figure_runs({"a": make_metrics(), "b": make_metrics()[:6]}, 3).axes
    alphas = [0.057 * 5, 0.057 * 10]
    assert data(left, "a") == ([67000, 134000], alphas)
    assert data(left, "b") == ([67000], alphas[:1])
    emitted = [1 + a + a**2 + a**3 for a in alphas]
    assert data(right, "a")[1] == pytest.approx(emitted)
    assert "γ = 3" in right.get_ylabel()
    markers = {line.get_label(): line.get_marker() for line in left.get_lines()}
    assert markers["a"] != markers["b"]


def test_runs_that_all_decoded_show_what_was_measured() -> None:
    _, right = figure_runs({"a": make_decoded(), "b": make_decoded()}).axes
    assert data(right, "a") == ([67000, 134000], [2.5, 2.0])
    assert right.get_ylabel() == "measured τ at γ = 4"
    _, mixed = figure_runs({"a": make_decoded(), "b": make_metrics()}).axes
    assert "from α" in mixed.get_ylabel()


def test_what_a_parallel_draft_would_emit_falls_from_place_to_place() -> None:
    rows = [row | {"expected_alpha_by_place": [0.8, 0.5, 0.1]} for row in make_metrics()]
    _, right = figure_runs({"a": rows}, 2).axes
    assert data(right, "a")[1] == pytest.approx([1 + 0.8 + 0.4] * 2)


def test_long_names_of_policies_in_a_sweep_do_not_run_into_each_other() -> None:
    names = ["skd-top_k-9-refresh_every-25", "skd-top_k-3-refresh_every-25"]
    figure = figure_sweep([("fkl", name, 1.0) for name in names], "τ")
    axes = figure.axes[0]
    figure.canvas.draw()
    left, right = (label.get_window_extent() for label in axes.get_xticklabels())
    assert left.x1 < right.x0
    assert [label.get_text().replace("\n", "") for label in axes.get_xticklabels()] == names


def test_the_sweep_is_a_grid_with_its_numbers_and_the_best_framed() -> None:
    figure = figure_sweep(SWEEP, "expected α")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fixed", "draft"]
    losses = ["fkl", "tvd, a long name", "rkl"]
    assert [label.get_text() for label in axes.get_yticklabels()] == losses
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {
        (0, 0): "0.410",
        (1, 0): "0.520",
        (0, 1): "–",
        (1, 1): "–",
        (0, 2): "–",
        (1, 2): "0.600",
    }
    (frame,) = axes.patches
    assert frame.get_xy() == pytest.approx((0.54, 1.56))
    assert "expected α" in words(figure)
    with pytest.raises(InputError, match="'fkl' with policy 'fixed' twice"):
        figure_sweep([*SWEEP, ("fkl", "fixed", 0.4)], "")
    with pytest.raises(InputError, match="at least one"):
        figure_sweep([], "")


def test_the_text_is_whole_and_every_token_marked() -> None:
    pieces: list[tuple[str, Kind]] = [
        ("Dear", "accepted"),
        (" $x$\n", "residual"),
        ("", "accepted"),
        ("bye" * 50, "bonus"),
    ]
    figure = figure_text(replace(EXAMPLE, pieces=pieces))
    axes = figure.axes[0]
    assert "".join(text.get_text() for text in axes.texts) == "Dear $x$⏎·" + ("bye" * 50)[:84]
    assert [patch.get_y() for patch in axes.patches] == [0.07, 0.07, 1.07, 2.07]
    looks = [
        (patch.get_facecolor(), patch.get_edgecolor()[:3], patch.get_width())
        for patch in axes.patches
    ]
    assert [width for _, _, width in looks] == [4, 5, 1, 84]
    grey = [luminance(face) for face, _, _ in looks]
    assert grey[1] < 0.5 < grey[0] < 0.95 < grey[3]
    assert looks[3][1] == (0, 0, 0)
    assert "2 of 4 tokens are the draft's" in titles(figure)
    long = replace(EXAMPLE, pieces=[("line\n", "accepted")] * 31)
    assert "(the first 30 lines)" in titles(figure_text(long))
    assert "γ = 4: " in titles(figure_text(long))
    assert "γ ≤ 4: " in titles(figure_text(long, early=True))


def test_several_drafts_are_drawn_together(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_run(tmp_path / name)
    AFTER.write(tmp_path / "c.json")
    sources = [tmp_path / "a", tmp_path / "b", tmp_path / "c.json"]
    paths = plot_together(sources, tmp_path / "out")
    assert [path.name for path in paths] == ["survival.png", "places.png", "runs.png"]
    assert all(map(is_picture, paths))
    assert [p.name for p in plot_together(sources[2:], tmp_path / "two")] == [
        "survival.png",
        "places.png",
    ]
    (tmp_path / "a" / "scorecard.json").unlink()
    said: list[str] = []
    names = [p.name for p in plot_together(sources[:2], tmp_path / "three", said.append)]
    assert names == ["survival.png", "places.png", "runs.png"]
    assert said == [f"{tmp_path / 'a'} has no scorecard.json yet: its training alone is drawn"]
    (tmp_path / "b" / "scorecard.json").unlink()
    assert [p.name for p in plot_together(sources[:2], tmp_path / "four")] == ["runs.png"]


def test_cards_that_cannot_be_compared_are_drawn_with_a_word(tmp_path: Path) -> None:
    sources = [tmp_path / "a.json", tmp_path / "b.json"]
    card = simulate({(0.0, 4): 0.7}, draft="a")
    other = replace(card, provenance={**card.provenance, "device": "another machine"})
    card.write(sources[0])
    other.write(sources[1])
    said: list[str] = []
    assert plot_together(sources, tmp_path / "out", said.append)
    assert any("machine differs" in line and "with care" in line for line in said)


def test_training_shows_the_metrics() -> None:
    metrics = make_metrics()
    left, right = figure_training(metrics).axes
    steps = [row for row in metrics if "loss" in row]
    assert data(left, "loss") == ([row["tokens"] for row in steps], [row["loss"] for row in steps])
    tokens = [67000, 134000]
    assert data(right, "expected α") == (tokens, [0.057 * 5, 0.057 * 10])
    assert data(right, "greedy match") == (tokens, [0.063 * 5, 0.063 * 10])


def test_training_shows_the_measured_tokens_a_call_and_what_was_kept() -> None:
    _, shares, decoded = figure_training(make_decoded()).axes
    assert data(decoded, "τ") == ([67000, 134000], [2.5, 2.0])
    assert data(decoded, "kept") == ([67000], [2.5])
    assert data(shares, "expected α") == ([67000, 134000], [0.057 * 5, 0.057 * 10])
    assert "γ = 4" in decoded.get_ylabel()


def test_an_unmeasured_temperature_says_so_and_leaves_the_other_alone() -> None:
    for figure in (figure_speedup(HALF_MEASURED), figure_time(HALF_MEASURED)):
        assert words(figure).count("nothing was measured") == 1
        assert any(label.get_visible() for label in figure.axes[0].get_xticklabels())
    assert words(figure_acceptance(WITHOUT_ROWS)).count("nothing was measured") == 2
    assert words(figure_training([])).count("nothing was measured") == 2


def is_picture(path: Path) -> bool:
    """A PNG wide enough to print, and more than one colour."""
    raw = path.read_bytes()
    width, height = int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")
    return raw[:4] == b"\x89PNG" and width > 800 and height > 300 and len(raw) > 10_000


def write_run(folder: Path) -> None:
    """A run folder as a finished run leaves it, but for draft, pictures and report."""
    make_after().write(folder / "scorecard.json")
    make_before().write(folder / "scorecard_before.json")
    lines = [json.dumps(row) + "\n" for row in make_metrics()]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def test_plot_all_draws_the_run_folder(tmp_path: Path) -> None:
    write_run(tmp_path)
    paths = plot_all(tmp_path)
    names = ["acceptance.png", "survival.png", "speedup.png", "time.png", "training.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    assert all(map(is_picture, paths))


def test_plot_all_needs_only_the_scorecard(tmp_path: Path) -> None:
    ONE_ROW.write(tmp_path / "scorecard.json")
    names = [path.name for path in plot_all(tmp_path)]
    assert names == ["acceptance.png", "survival.png", "speedup.png", "time.png"]
    elsewhere = plot_all(tmp_path, tmp_path / "other")
    assert [path.parent.name for path in elsewhere] == ["other"] * 4
    with pytest.raises(InputError, match=r"scorecard\.json"):
        plot_all(tmp_path / "elsewhere")


def test_a_damaged_metrics_line_is_named_and_a_cut_off_one_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1.0}\n{"loss": 0.', encoding="utf-8")
    assert read_metrics(path) == [{"loss": 1.0}]
    path.write_text('{"loss": 1.0}\n{"loss": {}}\n', encoding="utf-8")
    with pytest.raises(StorageError, match=r"metrics.jsonl, line 2 is damaged .*loss"):
        read_metrics(path)


def test_a_picture_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(StorageError, match=r"speedup\.png"):
        save(figure_speedup(AFTER), tmp_path / "plots" / "speedup.png")


def test_pyplot_is_not_loaded() -> None:
    code = "import sys, specdistill.report.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def titles(figure: Figure) -> str:
    """What stands over the panels: the figure's title and those of its legends."""
    parts = [figure.get_suptitle(), *(legend.get_title().get_text() for legend in figure.legends)]
    return " ".join(filter(None, parts))


def test_an_unusual_verification_is_the_title_of_every_picture() -> None:
    usual = make_after()
    for verification, label in (
        (Verification("token", "sq:0.7"), "LOSSY, lenience sq:0.7"),
        (Verification("block"), "block verification"),
    ):
        card = replace(usual, verification=verification)
        for draw in (figure_acceptance, figure_speedup, figure_time):
            assert titles(draw(card)) == label
            assert titles(draw(usual)) == ""
    lossy = replace(make_before(), verification=Verification("token", "lin:0.5"))
    assert titles(figure_acceptance(usual, lossy)) == "LOSSY, lenience lin:0.5"


def test_a_run_that_was_not_scored_yet_shows_its_training(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("scorecard.json", "scorecard_before.json"):
        (tmp_path / name).unlink()
    assert [path.name for path in plot_all(tmp_path)] == ["training.png"]
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="there is no scorecard"):
        plot_all(tmp_path)


def test_a_picture_that_cannot_be_drawn_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    drawn = plot_all(tmp_path)

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("no width")

    monkeypatch.setattr("specdistill.report.plots.figure_speedup", fails)
    said: list[str] = []
    again = plot_all(tmp_path, note=said.append)
    assert {path.name for path in drawn} - {path.name for path in again} == {"speedup.png"}
    assert said == ["speedup.png could not be drawn: ZeroDivisionError: no width"]
    assert not (tmp_path / "plots" / "speedup.png").exists()


@pytest.mark.parametrize(
    "name", ["$x_{", "$$", "_hidden", "http://a.b/c?d=$e$", "a\x1b[2J\n", "漢" * 9000]
)
def test_names_are_drawn_as_text(tmp_path: Path, name: str) -> None:
    card = replace(make_after(), example=DecodedText(name, 0.0, 4, [(name[:50], "accepted")]))
    parts = {name: 0.1, **card.rows[0].seconds}
    card = replace(card, rows=[replace(row, seconds=parts) for row in card.rows])
    card.write(tmp_path / "scorecard.json")
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(plot_all(tmp_path, note=said.append)) == 5
        figure = figure_runs({name: make_metrics()})
        save(figure, tmp_path / "runs.png")
        save(figure_sweep([(name, name, 1.0)], name), tmp_path / "sweep.png")
    assert said == []
    (legend,) = figure.legends
    assert visible(name)[:20] in legend.get_texts()[0].get_text().replace("\\$", "$")
