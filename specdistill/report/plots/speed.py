"""How fast a draft makes its target, and where the time goes."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from specdistill.quoting import drawn
from specdistill.report.plots import style
from specdistill.scoring.card_rows import Row
from specdistill.scoring.choice import judged
from specdistill.scoring.headline import gamma_is
from specdistill.scoring.scorecard import Scorecard

# The parts of `Row.seconds`, from the models' work to ours: name, colour, hatch.
TIME_PARTS = {
    "prefill": ("prompt", style.SKY, "...."),
    "draft": ("draft steps", style.ORANGE, ""),
    "target": ("verify pass", style.BLUE, "////"),
    "verify": ("verify function", style.GREEN, "xxxx"),
    "other": ("rest of the round", style.LIGHT_GREY, ""),
    "loop": ("between rounds", style.GREY, "----"),
}


def figure_speedup(card: Scorecard) -> Figure:
    """Speedup over plain decoding by γ, a panel per temperature: measured with 95% intervals,
    predicted from measured times (dashed), planned by the closed form (dotted). A row whose plain
    decoding was slowed down has no speedup to draw."""
    groups = style.by_temperature([judged(row, ()) for row in card.rows])
    looks = style.styles(groups)
    figure, panels = style.panels(len(groups), style.PANEL_HEIGHT, share_y=True)
    for axes, (temperature, rows) in zip(panels, groups.items(), strict=False):
        colour, marker = looks[temperature]
        axes.axhline(1.0, color=style.BLACK, lw=0.9, label="plain decoding")
        for line in style.lines(rows):
            gammas = [row.num_draft_tokens for row in line]
            low, high = zip(*(row.speedup_ci95 for row in line), strict=True)
            planned = [row.planned_speedup for row in line]
            axes.plot(gammas, planned, ":", lw=1, **style.mark(style.BLACK, "+", "planned"))
            predicted = [row.predicted_speedup for row in line]
            axes.plot(gammas, predicted, "--", lw=1, **style.mark(style.BLACK, "x", "predicted"))
            # Not `errorbar`, which refuses a bootstrap interval that leaves the estimate out.
            axes.vlines(gammas, low, high, color=colour, lw=1.3, label="95% interval")
            axes.plot(gammas * 2, low + high, "_", color=colour, ms=7, mew=1.3, label="its ends")
            measured = style.mark(colour, marker, "measured") | style.fill(line[0])
            axes.plot(gammas, [row.speedup for row in line], **measured)
        style.integer_ticks(axes, [row.num_draft_tokens for row in card.rows])
        axes.set_xlabel(style.GAMMA_LABEL)
        style.title(axes, temperature)
    panels[0].set_ylabel("speedup (×)")
    if groups:  # beside the first row of panels, where no curve can run into the words
        end = panels[min(len(panels), style.MAX_COLUMNS) - 1]
        place = end.get_yaxis_transform()
        end.text(1.02, 1, "plain\ndecoding", va="center", fontsize=style.POINTS, transform=place)
    for axes, rows in zip(panels, groups.values() or [[]], strict=True):
        style.finish(axes, [row.speedup for row in rows])
    keys = [
        style.key("measured, 95% interval", style.BLACK, "-", "o"),
        style.key("predicted from measured times", style.BLACK, "--", "x", lw=1),
        style.key("planned (closed form)", style.BLACK, ":", "+", lw=1),
        *style.early_keys(card.rows),
    ]
    style.legend(figure, keys, title=style.label(card))
    return figure


def figure_time(card: Scorecard) -> Figure:
    """Milliseconds per emitted token by what they are spent on: a panel per temperature, a bar
    per γ, plain decoding on top for comparison."""
    groups = style.by_temperature(card.rows)
    bars = 1 + max((len(rows) for rows in groups.values()), default=0)
    figure, panels = style.panels(len(groups), 1.1 + 0.27 * bars, share_x=True)
    used = {part for row in card.rows for part in row.seconds}
    looks = {part: look for part, look in TIME_PARTS.items() if part in used}
    looks |= {part: (part, style.PURPLE, "oo") for part in sorted(used - TIME_PARTS.keys())}
    rates = {base.temperature: base.tokens_per_second for base in card.baseline}
    for axes, (temperature, rows) in zip(panels, groups.items(), strict=False):
        plain = 1000 / rates[temperature] if rates.get(temperature) else math.nan
        axes.barh(
            [0], [plain], height=0.7, color="white", edgecolor=style.BLACK, label="plain decoding"
        )
        ends = [0.0] * len(rows)
        for part, (name, colour, hatch) in looks.items():
            widths = [_milliseconds_per_token(row, part) for row in rows]
            places = range(1, len(rows) + 1)
            for bar in axes.barh(places, widths, left=ends, height=0.7, label=drawn(name)):
                bar.set(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for place, end in enumerate([plain, *ends]):
            if math.isfinite(end):
                axes.text(end, place, f" {end:.1f}", va="center", fontsize=style.POINTS)
        names = ["plain", *(gamma_is(row).partition(" (")[0] for row in rows)]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(bars - 0.5, -0.5)  # downwards, and bars equally thick in every panel
        axes.margins(x=0.15)
        axes.set_xlabel("time per emitted token (ms)")
        style.title(axes, temperature)
    for axes, rows in zip(panels, groups.values() or [[]], strict=True):
        style.finish(
            axes, [_milliseconds_per_token(row, part) for row in rows for part in looks], "x"
        )
    keys = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=drawn(name))
        for name, colour, hatch in looks.values()
    ]
    style.legend(figure, keys, title=style.label(card))
    return figure


def _milliseconds_per_token(row: Row, part: str) -> float:
    return 1000 * row.seconds.get(part, 0.0) / row.emitted if row.emitted else math.nan
