"""What all pictures share: print size, colours and marks, legends, axes, saving.

One colour and one marker stand for one temperature, or one draft, in every picture; the colours
are Okabe and Ito's, which colour-blind readers tell apart, and none means anything by itself:
marks, line styles or hatches say the same in black and white.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from specdistill.files import replacing, writing
from specdistill.quoting import drawn
from specdistill.scoring.card_rows import Row
from specdistill.scoring.scorecard import Scorecard

T = TypeVar("T")
BLACK, GREY, LIGHT_GREY = "#000000", "#767676", "#BBBBBB"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = OKABE_ITO
STYLES = tuple(zip(OKABE_ITO, "osD^vP", strict=True))
FULL_WIDTH, SINGLE_WIDTH, PANEL_HEIGHT = 7.2, 4.4, 3.2  # inches; a printed text block is about 7
POINTS = 9  # font size
MARK, RING = 4.5, 8.5  # points; a ring is wider than a mark, so both show where they coincide
DOTS_PER_INCH = 200
MAX_TICKS = 12
MAX_COLUMNS = 3
LEGEND_WIDTH = 80  # letters that fit beside four marks
GAMMA_LABEL = "draft tokens per round, γ"


def t_is(temperature: float) -> str:
    return f"T = {temperature:g}"


def title(axes: Axes, temperature: float) -> None:
    axes.set_title(t_is(temperature), fontsize=POINTS, fontweight="bold", loc="left")


def by_temperature(rows: Iterable[Row]) -> dict[float, list[Row]]:
    """Rows grouped by temperature; temperatures, and γ within each, ascend."""
    groups: dict[float, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.temperature, row.num_draft_tokens)):
        groups.setdefault(row.temperature, []).append(row)
    return groups


def lines(rows: Sequence[Row]) -> list[list[Row]]:
    """What a line over γ may join: the rows of a fixed γ, and those that stop early."""
    halves = [row for row in rows if not row.least_reach], [row for row in rows if row.least_reach]
    return [half for half in halves if half]


def fill(row: Row) -> dict[str, str]:
    """Of its mark, hollow where the row stops early."""
    return {"mfc": "white"} if row.least_reach else {}


def early_keys(rows: Iterable[Row]) -> list[Artist]:
    """Of the legend, where a row stops early."""
    early = [row for row in rows if row.least_reach][:1]
    return [key("γ at most, stops early", BLACK, "", "o", **fill(row)) for row in early]


def panels(
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


def styles(things: Iterable[T]) -> dict[T, tuple[str, str]]:
    """Colour and marker of each; they begin anew after the last of `STYLES`."""
    return dict(zip(things, cycle(STYLES), strict=False))


def label(*cards: Scorecard) -> str:
    """The title of what is not the usual, see `Scorecard.label`."""
    return drawn("; ".join(dict.fromkeys(card.label for card in cards if card.label)))


def mark(colour: str, marker: str, label: str) -> dict[str, Any]:
    return {"color": colour, "marker": marker, "ms": MARK, "label": drawn(label)}


def key(label: str, colour: str, line: str, marker: str = "", **look: Any) -> Artist:
    """A legend entry of its own, not tied to one drawn line."""
    return Line2D([], [], ls=line, **(mark(colour, marker, label) | look))


def legend(owner: Axes | Figure, keys: Sequence[Artist], columns: int = 2, title: str = "") -> None:
    """Above what it explains, never over the data; the title of a figure goes on top of it, where
    the layout would let a `suptitle` run into it."""
    look = {"fontsize": POINTS, "frameon": False, "columnspacing": 1.2, "handletextpad": 0.5}
    if isinstance(owner, Figure):
        width = sum(len(str(each.get_label())) for each in keys)
        columns = 2 if owner.get_figwidth() < FULL_WIDTH else 4 if width < LEGEND_WIDTH else 3
        legend = owner.legend(handles=keys, loc="outside upper left", ncols=columns, **look)
        legend.set_title(title, prop=FontProperties(size=POINTS, weight="bold"))
    else:
        owner.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **look)


def integer_ticks(axes: Axes, values: Iterable[int]) -> None:
    ticks = sorted(set(values)) or [1]
    axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    if len(ticks) <= MAX_TICKS:
        axes.set_xticks(ticks)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))


def finish(axes: Axes, values: Iterable[float], grid: Literal["x", "y"] = "y") -> None:
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


def save(figure: Figure, path: Path) -> None:
    """Raises `StorageError`."""
    with writing(path, "is there room?"), replacing(path) as new, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # names too wide
        figure.savefig(new, format="png", dpi=DOTS_PER_INCH)
