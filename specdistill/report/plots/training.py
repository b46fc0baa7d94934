"""What training bought: curves of one run or several, and a sweep's grid."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from specdistill.errors import InputError
from specdistill.quoting import drawn
from specdistill.report.plots import style
from specdistill.scoring.statistics import planned_tokens


def figure_training(metrics: list[dict[str, Any]]) -> Figure:
    """By training tokens seen: the loss (left), and on held-out prompts expected α and greedy
    match, or the share of the text's tokens met where text alone was learnt from; and where they
    were decoded, the measured τ (right). The evaluation whose weights were kept has a ring. Rows
    without a panel's keys are left out of it.
    """
    logged = [row for row in metrics if "loss" in row]
    shares = (
        ("expected_alpha", "expected α", style.BLUE, "o"),
        ("greedy_match", "greedy match", style.VERMILLION, "s"),
        ("token_match", "tokens met", style.BLUE, "o"),
    )
    measured = {key for key, *_ in shares}
    held_out = [row for row in metrics if measured & row.keys() and "kept_step" not in row]
    kept_step = next((row["kept_step"] for row in metrics if "kept_step" in row), None)
    decoded = any("block_efficiency" in row for row in held_out)
    figure, (left, right, *third) = style.panels(3 if decoded else 2, style.PANEL_HEIGHT)
    tokens, losses = ([row[key] for row in logged] for key in ("tokens", "loss"))
    dot = "." if len(losses) == 1 else ""
    left.plot(tokens, losses, **style.mark(style.BLUE, dot, "loss") | {"lw": 1.2})
    left.set_ylabel("training loss per token")
    drawn = [(left, losses)]
    shown = [_held_out(right, held_out, kept_step, *share) for share in shares]
    drawn.append((right, [value for values in shown for value in values]))
    right.set_ylabel("share of held-out tokens")
    right.set_ylim(-0.03, 1.03)
    named: list[Artist] = [line for line in right.get_lines() if line.get_label() != "kept"]
    if named:
        if kept_step is not None:
            named.append(style.key("kept", style.BLACK, "", "o", mfc="none"))
        style.legend(right, named)
    for axes in third:
        tau = ("block_efficiency", "τ", style.GREEN, "D")
        drawn.append((axes, _held_out(axes, held_out, kept_step, *tau)))
        num = next(row["num_draft_tokens"] for row in held_out if "num_draft_tokens" in row)
        axes.set_ylabel(f"tokens per target call τ, γ = {num}")
    for axes, values in drawn:
        _finish(axes, values)
    return figure


def _finish(axes: Axes, values: Sequence[float]) -> None:
    """A panel over the tokens seen."""
    axes.set_xlim(left=0)
    axes.set_xlabel("training tokens seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.finish(axes, values)


def _held_out(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    kept_step: int | None,
    key: str,
    name: str,
    colour: str,
    marker: str,
) -> list[float]:
    """Draw what the rows have of a key, a ring at the step that was kept; returns the values."""
    having = [row for row in rows if key in row]
    if not having:
        return []
    tokens, values = ([row[each] for row in having] for each in ("tokens", key))
    axes.plot(tokens, values, **style.mark(colour, marker, name))
    for row in having:
        if kept_step is not None and row.get("step") == kept_step:
            ring = style.mark("none", "o", "kept") | {"ms": style.RING, "mec": style.BLACK}
            axes.plot(row["tokens"], row[key], **ring)
    return values


def figure_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], num_draft_tokens: int = 4
) -> Figure:
    """By training tokens seen, a line per run: expected α on held-out prompts (left), and the
    tokens of a round (right): measured where every run decoded with one γ, else what α would give
    with `num_draft_tokens`, Σ αⁱ, or of a parallel draft its α by place. Rows are a
    metrics.jsonl's.
    """
    figure, (left, right) = style.panels(2, style.PANEL_HEIGHT)
    looks = style.styles(runs)
    held_out = {
        name: [r for r in rows if "expected_alpha" in r and "kept_step" not in r]
        for name, rows in runs.items()
    }
    gammas: set[Any] = {r.get("num_draft_tokens") for rows in held_out.values() for r in rows}
    measured = len(gammas) == 1 and None not in gammas
    num: int = gammas.pop() if measured else num_draft_tokens
    alphas: list[float] = []
    for name, rows in held_out.items():
        tokens = [row["tokens"] for row in rows]
        mine = [row["expected_alpha"] for row in rows]
        emitted = [
            row["block_efficiency"] if measured else _expected_tokens(row, num) for row in rows
        ]
        left.plot(tokens, mine, **style.mark(*looks[name], name))
        right.plot(tokens, emitted, **style.mark(*looks[name], name))
        alphas += mine
    left.set_ylabel("expected α on held-out prompts")
    left.set_ylim(-0.03, 1.03)
    right.set_ylabel(f"measured τ at γ = {num}" if measured else f"expected τ at γ = {num}, from α")
    right.set_ylim(0.9, num + 1.1)
    for axes in (left, right):
        _finish(axes, alphas)
    style.legend(figure, [style.key(n, c, "-", m) for n, (c, m) in looks.items()])
    return figure


def _expected_tokens(row: Mapping[str, Any], num_draft_tokens: int) -> float:
    """Of a round, were acceptance at a place independent of that at others."""
    if (by_place := row.get("expected_alpha_by_place")) is None:
        return planned_tokens(row["expected_alpha"], num_draft_tokens)
    return 1 + sum(accumulate(by_place[:num_draft_tokens], mul))


def figure_sweep(rows: Sequence[tuple[str, str, float]], label: str) -> Figure:
    """Heat map of (loss, policy, value) rows in their order, NaN or a pair that is missing left
    blank with a dash, the best framed; `label` says what the values are. The numbers stand in the
    cells. Raises `InputError` for no rows, or a pair that is given twice.
    """
    if not rows:
        raise InputError("a sweep's picture needs at least one (loss, policy, value) row; got none")
    losses = list(dict.fromkeys(loss for loss, _, _ in rows))
    policies = list(dict.fromkeys(policy for _, policy, _ in rows))
    values: dict[tuple[str, str], float] = {}
    for loss, policy, value in rows:
        if (loss, policy) in values:
            raise InputError(
                f"the sweep gives loss {loss!r} with policy {policy!r} twice; give one value, such "
                "as the mean over seeds"
            )
        values[loss, policy] = value
    grid = [[values.get((loss, policy), math.nan) for policy in policies] for loss in losses]
    size = (1.9 + 1.0 * len(policies), 0.9 + 0.42 * len(losses))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    known = {pair: value for pair, value in values.items() if math.isfinite(value)}
    best = max(known, key=lambda pair: known[pair], default=None)
    middle = (min(known.values()) + max(known.values())) / 2 if known else math.nan
    for i, loss in enumerate(losses):
        for j, policy in enumerate(policies):
            value = grid[i][j]
            words = axes.text(j, i, f"{value:#.3g}" if math.isfinite(value) else "–")
            words.set(ha="center", va="center", fontsize=style.POINTS)
            words.set_color("white" if value < middle else "black")
            if (loss, policy) == best:
                words.set_fontweight("bold")
                corner = (j - 0.46, i - 0.44)
                axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, ec=style.VERMILLION, lw=2))
    across, down = (
        [textwrap.fill(drawn(name, 48), 16) for name in names] for names in (policies, losses)
    )
    axes.set_xticks(range(len(policies)), across, fontsize=style.POINTS)
    axes.set_yticks(range(len(losses)), down, fontsize=style.POINTS)
    axes.set_xlabel("data policy", fontsize=style.POINTS)
    axes.set_ylabel("loss", fontsize=style.POINTS)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(textwrap.fill(drawn(label), 40), fontsize=style.POINTS)
    bar.ax.tick_params(labelsize=style.POINTS)
    return figure
