"""The pictures of a run, at print size. matplotlib lives here alone, without pyplot's global state.

`figure_*` draw and return a `Figure`, `plot_*` save it as PNG, `plot_all` serves a run folder.
One colour and one marker stand for one temperature in every picture; the colours are Okabe and
Ito's, which colour-blind readers tell apart. A NaN leaves a gap; an empty panel says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from specdistill.errors import InputError, StorageError
from specdistill.scoring.scorecard import Row, Scorecard

BLACK, GREY, LIGHT_GREY = "#000000", "#767676", "#BBBBBB"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = OKABE_ITO
TEMPERATURE_STYLES = tuple(zip(OKABE_ITO, "osD^vP", strict=True))
# The parts of `Row.seconds`: what the reader is told, and in which colour.
TIME_PARTS = {
    "draft": ("draft steps", ORANGE),
    "target": ("verify pass", BLUE),
    "verify": ("verify function", GREEN),
    "other": ("rest", LIGHT_GREY),
}
FULL_WIDTH, SINGLE_WIDTH, PANEL_HEIGHT = 7.2, 4.4, 3.2  # inches; a printed text block is about 7
POINTS = 9  # font size
MARK, RING = 4.5, 8.5  # points; a ring is wider than a mark, so both show where they coincide
DOTS_PER_INCH = 200
MAX_TICKS = 12
MAX_COLUMNS = 3
GAMMA_LABEL = "draft tokens per round, γ"


def plot_acceptance(card: Scorecard, path: Path, before: Scorecard | None = None) -> None:
    """Save `figure_acceptance`; like all `plot_*`, raises `StorageError` if that fails."""
    _save(figure_acceptance(card, before), path)


def plot_speedup(card: Scorecard, path: Path) -> None:
    """Save `figure_speedup`."""
    _save(figure_speedup(card), path)


def plot_time(card: Scorecard, path: Path) -> None:
    """Save `figure_time`."""
    _save(figure_time(card), path)


def plot_training(metrics: list[dict[str, Any]], path: Path) -> None:
    """Save `figure_training`."""
    _save(figure_training(metrics), path)


def plot_all(run_dir: Path) -> list[Path]:
    """Draw what the files of `run_dir` allow into `run_dir/plots`; returns the pictures' paths.

    `scorecard.json` must be there; `scorecard_before.json` and `metrics.jsonl` need not.
    Raises `InputError` for a file that cannot be read, `StorageError` for one not written.
    """
    card = Scorecard.read(run_dir / "scorecard.json")
    before_path, metrics_path = run_dir / "scorecard_before.json", run_dir / "metrics.jsonl"
    before = Scorecard.read(before_path) if before_path.exists() else None
    names = ["acceptance.png", "speedup.png", "time.png"]
    paths = [run_dir / "plots" / name for name in names]
    plot_acceptance(card, paths[0], before)
    plot_speedup(card, paths[1])
    plot_time(card, paths[2])
    if metrics_path.exists():
        paths.append(run_dir / "plots" / "training.png")
        plot_training(read_metrics(metrics_path), paths[-1])
    return paths


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Raises `InputError`, naming the line that is no JSON object."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read metrics {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{path} line {number} is {line[:40]!r}, not a JSON object; if an interrupted run "
                "cut the line off, delete it"
            )
        rows.append(row)
    return rows


def figure_acceptance(card: Scorecard, before: Scorecard | None = None) -> Figure:
    """Left: α by γ, expected α as rings, `before` in grey. Right: acceptance by position at the
    largest γ, given that all earlier ones were accepted (solid) and over all rounds (dashed)."""
    figure, (left, right) = _panels(2, PANEL_HEIGHT)
    styles = _temperature_styles(card)
    before_rows = before.rows if before else []
    for temperature, rows in _by_temperature(before_rows).items():
        marker = styles.get(temperature, (GREY, "X"))[1]
        _draw_acceptance(left, rows, GREY, marker, f"before, {_t(temperature)}")
    for temperature, rows in _by_temperature(card.rows).items():
        _draw_acceptance(left, rows, *styles[temperature], _t(temperature))
    _integer_ticks(left, [row.num_draft_tokens for row in [*before_rows, *card.rows]])
    left.set_xlabel(GAMMA_LABEL)
    left.set_ylabel("acceptance rate α (accepted / tested)")
    keys = [_key(_t(t), colour, "-", marker) for t, (colour, marker) in styles.items()]
    keys.append(_key("expected α", BLACK, "", "o", ms=RING, mfc="none"))
    keys += [_key("before distillation", GREY, "", "o")] if before_rows else []
    _legend(left, keys)

    largest = max((row.num_draft_tokens for row in card.rows), default=1)
    shares: list[float] = []
    for row in card.rows:
        if row.num_draft_tokens != largest:
            continue
        colour, marker = styles[row.temperature]
        for values, line, name in (
            (row.acceptance_by_position, "-", "given earlier"),
            (row.survival_by_position, "--", "all rounds"),
        ):
            label = f"{name}, {_t(row.temperature)}"
            right.plot(range(1, len(values) + 1), values, line, **_mark(colour, marker, label))
            shares += values
    _integer_ticks(right, range(1, largest + 1))
    right.set_xlabel(f"position in the round (γ = {largest})")
    right.set_ylabel("share of draft tokens accepted")
    conditional = _key("if all earlier ones were accepted", BLACK, "-")
    _legend(right, [conditional, _key("over all rounds", BLACK, "--")], columns=1)
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.03)  # marks at 0 and at 1 stay whole
    if title := _verification(card, *([before] if before else [])):
        figure.suptitle(title, fontsize=POINTS, fontweight="bold")
    _finish(left, [row.acceptance_rate for row in [*before_rows, *card.rows]])
    _finish(right, shares)
    return figure


def _draw_acceptance(axes: Axes, rows: Sequence[Row], colour: str, marker: str, name: str) -> None:
    gammas = [row.num_draft_tokens for row in rows]
    expected = [row.acceptance_rate_expected for row in rows]
    axes.plot(gammas, [row.acceptance_rate for row in rows], **_mark(colour, marker, name))
    ring = _mark(colour, marker, f"expected, {name}") | {"ls": "", "ms": RING, "mfc": "none"}
    axes.plot(gammas, expected, **ring)


def figure_speedup(card: Scorecard) -> Figure:
    """Speedup over plain decoding by γ, a panel per temperature: measured with 95% intervals,
    predicted from measured times (dashed), planned by the closed form (dotted)."""
    groups = _by_temperature(card.rows)
    figure, panels = _panels(len(groups), PANEL_HEIGHT, share_y=True)
    for axes, (temperature, rows) in zip(panels, groups.items(), strict=False):
        colour, marker = _temperature_styles(card)[temperature]
        gammas = [row.num_draft_tokens for row in rows]
        low, high = zip(*(row.speedup_ci95 for row in rows), strict=True)
        axes.axhline(1.0, color=BLACK, lw=0.9, label="plain decoding")
        planned = [row.planned_speedup for row in rows]
        axes.plot(gammas, planned, ":", lw=1, **_mark(BLACK, "+", "planned"))
        predicted = [row.predicted_speedup for row in rows]
        axes.plot(gammas, predicted, "--", lw=1, **_mark(BLACK, "x", "predicted"))
        # Not `errorbar`, which refuses a bootstrap interval that leaves the point estimate out.
        axes.vlines(gammas, low, high, color=colour, lw=1.3, label="95% interval")
        axes.plot(gammas * 2, low + high, "_", color=colour, ms=7, mew=1.3, label="interval ends")
        axes.plot(gammas, [row.speedup for row in rows], **_mark(colour, marker, "measured"))
        _integer_ticks(axes, [row.num_draft_tokens for row in card.rows])
        axes.set_xlabel(GAMMA_LABEL)
        axes.set_title(_t(temperature), fontsize=POINTS, fontweight="bold", loc="left")
    panels[0].set_ylabel("speedup (×)")
    if groups:  # beside the first row of panels, where no curve can run into the words
        end = panels[min(len(panels), MAX_COLUMNS) - 1]
        place = end.get_yaxis_transform()
        end.text(1.02, 1, "plain\ndecoding", va="center", fontsize=POINTS, transform=place)
    for axes, rows in zip(panels, groups.values() or [[]], strict=True):
        _finish(axes, [row.speedup for row in rows])
    keys = [
        _key("measured, 95% interval", BLACK, "-", "o"),
        _key("predicted from measured times", BLACK, "--", "x", lw=1),
        _key("planned (closed form)", BLACK, ":", "+", lw=1),
    ]
    _legend(figure, keys, title=_verification(card))
    return figure


def figure_time(card: Scorecard) -> Figure:
    """Milliseconds per emitted token by what they are spent on: a panel per temperature, a bar
    per γ, plain decoding on top for comparison."""
    groups = _by_temperature(card.rows)
    bars = 1 + max((len(rows) for rows in groups.values()), default=0)
    figure, panels = _panels(len(groups), 1.1 + 0.27 * bars, share_x=True)
    used = {part for row in card.rows for part in row.seconds}
    spare = iter([PURPLE, SKY, VERMILLION, BLACK] * len(used))
    looks = {part: look for part, look in TIME_PARTS.items() if part in used}
    looks |= {part: (part, next(spare)) for part in sorted(used - TIME_PARTS.keys())}
    rates = {base.temperature: base.tokens_per_second for base in card.baseline}
    for axes, (temperature, rows) in zip(panels, groups.items(), strict=False):
        plain = 1000 / rates[temperature] if rates.get(temperature) else math.nan
        axes.barh([0], [plain], height=0.7, color="white", edgecolor=BLACK, label="plain decoding")
        ends = [0.0] * len(rows)
        for part, (name, colour) in looks.items():
            widths = [_milliseconds_per_token(row, part) for row in rows]
            places = range(1, len(rows) + 1)
            axes.barh(places, widths, left=ends, height=0.7, color=colour, label=name)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for place, end in enumerate([plain, *ends]):
            if math.isfinite(end):
                axes.text(end, place, f" {end:.1f}", va="center", fontsize=POINTS)
        names = ["plain", *(f"γ = {row.num_draft_tokens}" for row in rows)]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(bars - 0.5, -0.5)  # downwards, and bars equally thick in every panel
        axes.margins(x=0.15)
        axes.set_xlabel("time per emitted token (ms)")
        axes.set_title(_t(temperature), fontsize=POINTS, fontweight="bold", loc="left")
    for axes, rows in zip(panels, groups.values() or [[]], strict=True):
        _finish(axes, [_milliseconds_per_token(row, part) for row in rows for part in looks], "x")
    keys = [_key(name, colour, "", "s", ms=8) for name, colour in looks.values()]
    _legend(figure, keys, title=_verification(card))
    return figure


def _milliseconds_per_token(row: Row, part: str) -> float:
    return 1000 * row.seconds.get(part, 0.0) / row.emitted if row.emitted else math.nan


def figure_training(metrics: list[dict[str, Any]]) -> Figure:
    """By training tokens seen: the loss (left), and on held-out prompts expected α and greedy
    match (right). Rows without the key "loss" or "expected_alpha" are left out of that panel."""
    figure, (left, right) = _panels(2, PANEL_HEIGHT)
    logged = [row for row in metrics if "loss" in row]
    held_out = [row for row in metrics if "expected_alpha" in row]
    losses = [row["loss"] for row in logged]
    point = "." if len(losses) == 1 else ""
    left.plot([row["tokens"] for row in logged], losses, **_mark(BLUE, point, "loss") | {"lw": 1.2})
    left.set_ylabel("training loss per token")
    shares: list[float] = []
    for key, name, colour, marker in (
        ("expected_alpha", "expected α", BLUE, "o"),
        ("greedy_match", "greedy match", VERMILLION, "s"),
    ):
        values = [row.get(key, math.nan) for row in held_out]
        right.plot([row["tokens"] for row in held_out], values, **_mark(colour, marker, name))
        shares += values
    right.set_ylabel("share of held-out tokens")
    right.set_ylim(-0.03, 1.03)
    _legend(right, right.get_lines())
    for axes, values in ((left, losses), (right, shares)):
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes, values)
    return figure


def _t(temperature: float) -> str:
    return f"T = {temperature:g}"


def _by_temperature(rows: Iterable[Row]) -> dict[float, list[Row]]:
    """Rows grouped by temperature; temperatures, and γ within each, ascend."""
    groups: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.temperature, row.num_draft_tokens)):
        groups.setdefault(row.temperature, []).append(row)
    return groups


def _temperature_styles(card: Scorecard) -> dict[float, tuple[str, str]]:
    """Colour and marker of each temperature of the card."""
    return dict(zip(_by_temperature(card.rows), cycle(TEMPERATURE_STYLES), strict=False))


def _panels(
    count: int, height: float, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels (at least one), each of `height` inches."""
    count = max(count, 1)
    columns = min(count, MAX_COLUMNS)
    rows = math.ceil(count / columns)
    width = SINGLE_WIDTH if columns == 1 else FULL_WIDTH
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False)
    for unused in grid.flat[count:]:
        unused.remove()
    return figure, list(grid.flat[:count])


def _verification(*cards: Scorecard) -> str:
    """The title of what is not the usual: block verification, or a LOSSY one."""
    return "; ".join(dict.fromkeys(c.verification.label for c in cards if c.verification.label))


def _mark(colour: str, marker: str, label: str) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "ms": MARK, "label": label}


def _key(label: str, colour: str, line: str, marker: str = "", **look: Any) -> Artist:
    """A legend entry of its own, not tied to one drawn line."""
    return Line2D([], [], ls=line, **(_mark(colour, marker, label) | look))


def _legend(
    owner: Axes | Figure, keys: Sequence[Artist], columns: int = 2, title: str = ""
) -> None:
    """Above what it explains, never over the data; the title of a figure goes on top of it, where
    the layout would let a `suptitle` run into it."""
    look = {"fontsize": POINTS, "frameon": False, "columnspacing": 1.2, "handletextpad": 0.5}
    if isinstance(owner, Figure):
        columns = 2 if owner.get_figwidth() < FULL_WIDTH else 4
        legend = owner.legend(handles=keys, loc="outside upper left", ncols=columns, **look)
        legend.set_title(title, prop=FontProperties(size=POINTS, weight="bold"))
    else:
        owner.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **look)


def _integer_ticks(axes: Axes, values: Iterable[int]) -> None:
    ticks = sorted(set(values)) or [1]
    axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    if len(ticks) <= MAX_TICKS:
        axes.set_xticks(ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))


def _finish(axes: Axes, values: Iterable[float], grid: Literal["x", "y"] = "y") -> None:
    """Open frame, faint grid, one font size; and words where none of `values` can be drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=POINTS, labelbottom=True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(POINTS)
    if any(map(math.isfinite, values)):
        axes.grid(axis=grid, color="#E5E5E5", lw=0.6)
        axes.set_axisbelow(True)
    else:
        words = axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes)
        words.set(ha="center", va="center", fontsize=POINTS)
        axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; is there room?") from error
