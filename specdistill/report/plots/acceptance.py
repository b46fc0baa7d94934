"""Which draft tokens were accepted: by γ, by position in a round, along a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from scipy import stats

from specdistill.quoting import drawn, visible
from specdistill.report.plots import style
from specdistill.scoring.card_rows import DecodedText, Kind, Row, with_fixed_gamma
from specdistill.scoring.scorecard import Scorecard


def figure_acceptance(card: Scorecard, before: Scorecard | None = None) -> Figure:
    """Left: α by γ, expected α as rings, `before` in grey. Right: acceptance by position at the
    largest fixed γ, given that all earlier ones were accepted (solid, with 95% intervals) and over
    all rounds (dashed)."""
    figure, (left, right) = style.panels(2, style.PANEL_HEIGHT)
    styles = style.styles(style.by_temperature(card.rows))
    before_rows = before.rows if before else []
    for temperature, rows in style.by_temperature(before_rows).items():
        marker = styles.get(temperature, (style.GREY, "X"))[1]
        _draw_acceptance(left, rows, style.GREY, marker, f"before, {style.t_is(temperature)}")
    for temperature, rows in style.by_temperature(card.rows).items():
        _draw_acceptance(left, rows, *styles[temperature], style.t_is(temperature))
    style.integer_ticks(left, [row.num_draft_tokens for row in [*before_rows, *card.rows]])
    left.set_xlabel(style.GAMMA_LABEL)
    left.set_ylabel("acceptance rate α (accepted / tested)")
    keys = [style.key(style.t_is(t), colour, "-", marker) for t, (colour, marker) in styles.items()]
    keys.append(style.key("expected α", style.BLACK, "", "o", ms=style.RING, mfc="none"))
    keys += [style.key("before distillation", style.GREY, "", "o")] if before_rows else []
    keys += style.early_keys(card.rows)
    style.legend(left, keys)

    fixed = with_fixed_gamma(card.rows)  # what an early stop left out is not like what it did not
    largest = max((row.num_draft_tokens for row in fixed), default=1)
    shares: list[float] = []
    for row in fixed:
        if row.num_draft_tokens != largest:
            continue
        colour, marker = styles[row.temperature]
        _draw_uncertainty(right, row, colour)
        for values, line, name in (
            (row.acceptance_by_position, "-", "given earlier"),
            (row.survival_by_position, "--", "all rounds"),
        ):
            label = f"{name}, {style.t_is(row.temperature)}"
            right.plot(range(1, len(values) + 1), values, line, **style.mark(colour, marker, label))
            shares += values
    style.integer_ticks(right, range(1, largest + 1))
    right.set_xlabel(f"position in the round (γ = {largest})")
    right.set_ylabel("share of draft tokens accepted")
    conditional = style.key("if all earlier ones were accepted", style.BLACK, "-")
    style.legend(right, [conditional, style.key("over all rounds", style.BLACK, "--")], columns=1)
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.03)  # marks at 0 and at 1 stay whole
    if title := style.label(card, *([before] if before else [])):
        figure.suptitle(title, fontsize=style.POINTS, fontweight="bold")
    style.finish(left, [row.acceptance_rate for row in [*before_rows, *card.rows]])
    style.finish(right, shares)
    return figure


def _draw_uncertainty(axes: Axes, row: Row, colour: str) -> None:
    """95% intervals of the conditional rates: late positions are reached in few rounds."""
    reached = [row.rounds * survival for survival in [1.0, *row.survival_by_position]]
    for place, (rate, count) in enumerate(
        zip(row.acceptance_by_position, reached, strict=False), start=1
    ):
        tested = max(round(count), 1)
        interval = stats.binomtest(round(rate * tested), tested).proportion_ci(method="wilson")
        axes.vlines(place, interval.low, interval.high, color=colour, lw=1, alpha=0.6)


def _draw_acceptance(axes: Axes, rows: Sequence[Row], colour: str, marker: str, name: str) -> None:
    gammas = [row.num_draft_tokens for row in rows]
    for line in style.lines(rows):
        rates = [row.acceptance_rate for row in line]
        look = style.mark(colour, marker, name) | style.fill(line[0])
        axes.plot([row.num_draft_tokens for row in line], rates, **look)
    ring = style.mark(colour, marker, f"expected, {name}") | {
        "ls": "",
        "ms": style.RING,
        "mfc": "none",
    }
    axes.plot(gammas, [row.acceptance_rate_expected for row in rows], **ring)


def figure_survival(cards: Mapping[str, Scorecard]) -> Figure:
    """How far rounds get: over the position, the share of rounds accepted at least up to there, a
    panel per temperature and a line per draft, at the largest fixed γ of each. Dotted: αⁱ, what the
    draft's α would give if acceptance did not depend on the position or on the round.
    """

    def draw(axes: Axes, row: Row, name: str, colour: str, marker: str) -> list[float]:
        survival = [1.0, *row.survival_by_position]
        places = range(len(survival))
        independent = [row.acceptance_rate**i for i in places]
        axes.plot(places, independent, ":", color=colour, lw=1.2, label=f"αⁱ, {name}")
        axes.plot(places, survival, **style.mark(colour, marker, name))
        return row.survival_by_position

    key = style.key("αⁱ, if acceptance were independent", style.BLACK, ":", lw=1.2)
    labels = ("draft tokens accepted, at least", "share of rounds")
    return _figure_of_drafts(cards, draw, labels, range(1), [key])


def figure_places(cards: Mapping[str, Scorecard]) -> Figure:
    """Acceptance by position if all earlier ones were accepted, with 95% intervals, a panel per
    temperature and a line per draft, at the largest fixed γ of each. A draft that knows the tokens
    before a place keeps its rate; a parallel one guesses them, and loses by every place.
    """

    def draw(axes: Axes, row: Row, name: str, colour: str, marker: str) -> list[float]:
        _draw_uncertainty(axes, row, colour)
        places = range(1, len(row.acceptance_by_position) + 1)
        axes.plot(places, row.acceptance_by_position, **style.mark(colour, marker, name))
        return row.acceptance_by_position

    labels = ("position in the round", "accepted, if all earlier ones were")
    return _figure_of_drafts(cards, draw, labels, range(1, 1), [])


Draw = Callable[[Axes, Row, str, str, str], list[float]]  # name, colour, marker; what it has drawn


def _figure_of_drafts(
    cards: Mapping[str, Scorecard],
    draw: Draw,
    labels: tuple[str, str],
    before: range,
    keys: list[Artist],
) -> Figure:
    """A panel per temperature, with each draft's largest fixed γ. The axis has the positions of a
    round, and `before` them.
    """
    temperatures = sorted({row.temperature for card in cards.values() for row in card.rows})
    figure, panels = style.panels(len(temperatures), style.PANEL_HEIGHT, share_y=True)
    looks = style.styles(cards)
    fixed = {name: with_fixed_gamma(card.rows) for name, card in cards.items()}
    longest = max((row.num_draft_tokens for rows in fixed.values() for row in rows), default=1)
    shown: dict[int, list[float]] = {index: [] for index in range(len(panels))}
    for index, temperature in enumerate(temperatures):
        axes = panels[index]
        for name, card in cards.items():
            if rows := style.by_temperature(card.rows).get(temperature):
                shown[index] += draw(axes, with_fixed_gamma(rows)[-1], name, *looks[name])
        style.title(axes, temperature)
        axes.set_xlabel(labels[0])
    for index, axes in enumerate(panels):
        style.integer_ticks(axes, [*before, *range(1, longest + 1)])
        axes.set_ylim(-0.03, 1.03)
        style.finish(axes, shown[index])
    panels[0].set_ylabel(labels[1])
    names = []
    for name, (colour, marker) in looks.items():
        gammas = [row.num_draft_tokens for row in fixed[name]]
        words = f"{name}, γ = {max(gammas)}" if gammas else name
        words += ", parallel" if cards[name].drafting == "parallel" else ""
        names.append(style.key(words, colour, "-", marker))
    style.legend(figure, [*names, *keys], title=style.label(*cards.values()))
    return figure


# How a token came about, told by fill, weight and frame as well as by colour: name, face, edge,
# letters.
TEXT_LOOKS: dict[Kind, tuple[str, str, str, str]] = {
    "accepted": ("accepted draft token", "#D6E6F2", "white", "black"),
    "residual": ("after a rejection, by the target", style.VERMILLION, "white", "white"),
    "bonus": ("bonus after full acceptance", "white", style.BLACK, "black"),
}
MAX_LINES = 30
COLUMNS = 84  # of a fixed-width font at `style.POINTS`, across a page
LINE_HEIGHT, LEGEND_HEIGHT = 0.21, 0.65  # inches


def figure_text(example: DecodedText, early: bool = False) -> Figure:
    """One answer, each token marked as accepted, residual or bonus; its first `MAX_LINES` lines.
    Drafting that stops `early` proposes γ at most.
    """
    lines = _wrapped(example.pieces)
    shown = lines[:MAX_LINES]
    height = LINE_HEIGHT * len(shown) + LEGEND_HEIGHT
    figure = Figure(figsize=(style.FULL_WIDTH, height))
    axes = figure.add_axes((0.01, 0.01, 0.98, 1 - LEGEND_HEIGHT / height))
    axes.set(xlim=(0, COLUMNS), ylim=(max(len(shown), 1), 0))
    axes.axis("off")
    for place, line in enumerate(shown):
        for column, text, kind in line:
            _, face, edge, ink = TEXT_LOOKS[kind]
            corner, size = (column, place + 0.07), (len(text), 0.86)
            box = Rectangle(corner, *size, facecolor=face, edgecolor=edge, lw=1)
            box.set_zorder(2 if kind == "bonus" else 1)  # no neighbour covers its frame
            axes.add_patch(box)
            for offset, letter in enumerate(text):  # each in its cell, whatever the font
                words = axes.text(column + offset + 0.5, place + 0.53, letter, color=ink)
                words.set(ha="center", va="center", fontsize=style.POINTS, parse_math=False)
                words.set_fontfamily("monospace")
                words.set_fontweight("bold" if kind == "residual" else "normal")
    keys = [
        Patch(facecolor=face, edgecolor=edge, lw=1, label=name)
        for name, face, edge, _ in TEXT_LOOKS.values()
    ]
    accepted = sum(kind == "accepted" for _, kind in example.pieces)
    more = f" (the first {MAX_LINES} lines)" if len(lines) > MAX_LINES else ""
    title = (
        f"prompt {drawn(example.prompt_id, 40)}, {style.t_is(example.temperature)}, "
        f"γ {'≤' if early else '='} {example.num_draft_tokens}: {accepted} of "
        f"{len(example.pieces)} tokens are the draft's{more}"
    )
    style.legend(figure, keys, title=title)
    return figure


def _wrapped(pieces: Sequence[tuple[str, Kind]]) -> list[list[tuple[int, str, Kind]]]:
    """Pieces with the column each begins at, line by line. One that does not fit goes to the next
    line, or is cut where it is longer than a line; a line break shows as ⏎ and ends its line.
    """
    lines: list[list[tuple[int, str, Kind]]] = [[]]
    column = 0
    for piece, kind in pieces:
        for text in piece.replace("\t", " ").splitlines(keepends=True) or ["·"]:
            ends = text.endswith("\n")
            shown = visible(text.replace("\n", "⏎"))[:COLUMNS]
            if column + len(shown) > COLUMNS:
                lines.append([])
                column = 0
            lines[-1].append((column, shown, kind))
            column += len(shown)
            if ends:
                lines.append([])
                column = 0
    return [line for line in lines if line]
