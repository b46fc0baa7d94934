"""Whether a draft pays where several requests are under way."""

from __future__ import annotations

from matplotlib.figure import Figure

from specdistill.report.plots import style
from specdistill.scoring.scorecard import Scorecard


def figure_load(card: Scorecard) -> Figure:
    """Speedup over plain decoding by concurrency, a panel per temperature and a line per γ; filled
    marks are where the draft was faster than every plain run.
    """
    temperatures = list(dict.fromkeys(row.temperature for row in card.load.plain))
    figure, panels = style.panels(len(temperatures), style.PANEL_HEIGHT, share_y=True)
    gammas = sorted({row.num_draft_tokens for row in card.load.drafted})
    looks = style.styles(gammas)
    for axes, temperature in zip(panels, temperatures, strict=False):
        axes.axhline(1.0, color=style.BLACK, lw=0.9, label="plain decoding")
        rows = [row for row in card.load.drafted if row.temperature == temperature]
        rows.sort(key=lambda row: row.concurrency)
        for num in gammas:
            line = [row for row in rows if row.num_draft_tokens == num]
            colour, marker = looks[num]
            look = style.mark(colour, marker, f"γ = {num}")
            axes.plot([row.concurrency for row in line], [row.speedup for row in line], **look)
            for row in line:
                if not row.pays:
                    axes.plot([row.concurrency], [row.speedup], marker, color=colour, mfc="white")
        axes.set_xscale("log", base=2)
        ticks = sorted({row.concurrency for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("requests at a time")
        style.title(axes, temperature)
        style.finish(axes, [row.speedup for row in rows])
        axes.legend(fontsize=style.POINTS)
    panels[0].set_ylabel("speedup (×)")
    return figure
