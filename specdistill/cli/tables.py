"""What the command line shows of a result, as rich tables and lines of text; `cli` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from specdistill.scoring.card_rows import PLAIN_SLOWED, Row
from specdistill.scoring.headline import gamma, gamma_is, labelled, number, speedup
from specdistill.scoring.verdict import identity_words

if TYPE_CHECKING:
    from specdistill.provenance import Environment
    from specdistill.scoring.check import Check
    from specdistill.scoring.compare import Comparison, Standing
    from specdistill.scoring.load import Drafted, Plain
    from specdistill.scoring.scorecard import Scorecard

NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 0)}  # ten columns in 80 characters


def rows_table(card: Scorecard) -> Table:
    """Every setting of a scorecard."""
    table = Table(
        "T",
        "γ",
        "α",
        "exp. α",
        "τ",
        "tok/s",
        Column("speedup [95%]", no_wrap=True),
        "pred.",
        "c",
        "v",
        title=labelled("speculative decoding", card),
        caption=_caption(card.rows),
        **NARROW,
    )
    for row in card.rows:
        table.add_row(
            f"{row.temperature:g}",
            gamma(row),
            number(row.acceptance_rate, 3),
            number(row.acceptance_rate_expected, 3),
            f"{row.block_efficiency:.2f}",
            f"{row.tokens_per_second:.1f}",
            speedup(row),
            number(row.predicted_speedup, 2),
            number(row.cost_ratio, 3),
            number(row.verify_ratio, 2),
        )
    return table


def slices_tables(card: Scorecard) -> list[Table]:
    """The fastest setting by category and by length of prompts, where there are several."""
    tables = []
    slices = {"category": card.slices("by_category"), "length": card.slices("by_prompt_length")}
    for what, rows in slices.items():
        if not rows:
            continue
        best = card.verdict_row()
        title = f"by {what} of prompts, T = {best.temperature:g}, {gamma_is(best)}"
        interval = Column("speedup [95%]", no_wrap=True)
        head = (what, "prompts", "α", "τ", interval)
        table = Table(*head, title=labelled(title, card), **NARROW)
        for row in rows:
            table.add_row(
                row.category,
                str(row.prompts),
                number(row.acceptance_rate, 3),
                f"{row.block_efficiency:.2f}",
                speedup(row),
            )
        tables.append(table)
    return tables


def load_tables(card: Scorecard) -> list[Table]:
    """What came of several requests at a time, if that was measured."""
    if not card.load.drafted:
        return []
    table = Table(
        "T",
        "at a time",
        "γ",
        "tok/s",
        "speedup",
        "first token",
        "a token [95%]",
        title=labelled("requests at a time", card),
        caption="first token: median ms; a token: median ms and the 95th percentile",
        **NARROW,
    )
    plain = {(row.temperature, row.concurrency): row for row in card.load.plain}
    for setting, rows in groupby(card.load.drafted, lambda row: (row.temperature, row.concurrency)):
        where = [f"{setting[0]:g}", str(setting[1])]
        if base := plain.get(setting):
            rate = sum(base.tokens_per_second) / len(base.tokens_per_second)
            table.add_row(*where, "plain", f"{rate:.1f}", "", *_milliseconds(base))
            where = ["", ""]
        for row in rows:
            speed = number(row.speedup, 2) + ("" if row.pays or not base else " no gain")
            rate = row.tokens_per_second
            table.add_row(
                *where, str(row.num_draft_tokens), f"{rate:.1f}", speed, *_milliseconds(row)
            )
            where = ["", ""]
    return [table]


def _milliseconds(row: Plain | Drafted) -> tuple[str, str]:
    each = row.seconds_per_token
    return (
        number(1000 * row.first_token_seconds.median, 1),
        f"{number(1000 * each.median, 1)} [{number(1000 * each.p95, 1)}]",
    )


def environment_table(facts: Environment) -> Table:
    """What `env` shows."""
    table = Table(show_header=False, title="environment")
    table.add_column()
    table.add_column(overflow="fold")
    for name, version in facts.versions.items():
        table.add_row(name, version)
    if facts.git:
        table.add_row("git commit", facts.git)
    table.add_row("system", facts.system)
    for device, what in facts.devices.items():
        table.add_row(device, what)
    table.add_row("cores, threads", f"{facts.cores}, {facts.threads}")
    table.add_row("memory", f"{facts.memory_bytes / 1e9:.1f} GB")
    for part in facts.optional:
        status = part.version or f"missing: {part.remedy}"
        table.add_row(part.purpose, f"{part.package} {status}")
    return table


def before_after_table(before: Scorecard, after: Scorecard) -> Table:
    """The fastest setting at each temperature, before and after distillation."""
    table = Table(
        "",
        "γ",
        "expected α",
        "τ",
        "speedup [95%]",
        title=labelled("before and after distillation, held-out prompts", after),
    )
    shown = []
    for baseline in after.baseline:
        for name, card in (("before", before), ("after", after)):
            shown.append(row := card.best_row(baseline.temperature))
            table.add_row(
                f"T={row.temperature:g} {name}",
                gamma(row),
                number(row.acceptance_rate_expected, 3),
                f"{row.block_efficiency:.2f}",
                speedup(row),
            )
    table.caption = _caption(shown)
    return table


def heldout_line(metrics: Mapping[str, float]) -> str:
    """The last row of a run's metrics: what the kept weights are worth on held-out answers."""
    names = {
        "expected_alpha": "expected α",
        "greedy_match": "greedy match",
        "ce": "cross entropy",
        "token_match": "tokens met",
    }
    parts = [f"{name} {metrics[key]:.3f}" for key, name in names.items() if key in metrics]
    if "block_efficiency" in metrics:
        num = f"{metrics['num_draft_tokens']:g}"
        parts.append(f"measured τ {metrics['block_efficiency']:.2f} at γ = {num}")
    best, last = metrics["kept_step"], metrics["step"]
    return f"held-out {', '.join(parts)} with the weights of step {best:,} of {last:,}"


def sweep_table(cards: Mapping[str, Scorecard]) -> Table:
    """A row for every run and temperature, at its fastest γ."""
    interval = Column("speedup [95%]", no_wrap=True)
    run = Column("run", overflow="fold")
    table = Table(run, "T", "γ", "α", "τ", interval, **NARROW, title="runs")
    for name, card in cards.items():
        for i, baseline in enumerate(card.baseline):
            row = card.best_row(baseline.temperature)
            table.add_row(
                "" if i else labelled(name, card),
                f"{row.temperature:g}",
                gamma(row),
                number(row.acceptance_rate, 3),
                f"{row.block_efficiency:.2f}",
                speedup(row),
            )
    return table


def leaderboard(comparison: Comparison) -> list[Table]:
    """A table for every temperature, the fastest first."""
    groups: dict[float, list[Standing]] = {}
    for standing in comparison.standings:
        groups.setdefault(standing.temperature, []).append(standing)
    tables = []
    for temperature, standings in groups.items():
        table = Table(
            "",
            Column("scorecard", overflow="fold"),
            Column("draft", overflow="fold"),
            "γ",
            "α",
            "τ",
            "tok/s",
            "plain",
            Column("speedup [95%]", no_wrap=True),
            **NARROW,
            title=f"by measured speed at T = {temperature:g}, {standings[0].prompts} prompts",
        )
        for place, standing in enumerate(standings, 1):
            table.add_row(
                str(place),
                f"{standing.card} ({standing.label})" if standing.label else standing.card,
                f"{standing.draft} {standing.draft_sha256[:8]}",
                gamma(standing),
                number(standing.acceptance_rate, 3),
                f"{standing.block_efficiency:.2f}",
                f"{standing.tokens_per_second:.1f}",
                f"{standing.plain_tokens_per_second:.1f}",
                speedup(standing),
            )
        tables.append(table)
    return tables


def by_cost_tables(comparison: Comparison) -> list[Table]:
    """What two drafts of the same weights are worth by the cost of a draft step."""
    shown = []
    for pair in comparison.by_cost:
        table = Table(
            "c",
            Column(f"{pair.autoregressive}: τ / (1 + γc)", overflow="fold"),
            Column(f"{pair.parallel} (parallel): τ / (1 + c)", overflow="fold"),
            "ratio",
            **NARROW,
            title=f"by the cost c of a draft step, T = {pair.temperature:g}, verifying free",
        )
        for at in pair.costs:
            (one, gamma_one), (other, gamma_other) = at.autoregressive, at.parallel
            table.add_row(
                f"{at.cost_ratio:g}",
                f"{one:.2f} at γ = {gamma_one}",
                f"{other:.2f} at γ = {gamma_other}",
                f"{other / one:.2f}",
            )
        shown.append(table)
    return shown


def evidence_line(card: Scorecard) -> str:
    """The proof of losslessness in one line, or that there is none to be had."""
    proof = card.lossless
    if card.verification.lossy:
        return f"{card.verification.label}: the text does not follow the target's distribution"
    same, compared = proof.greedy_identical
    greedy = f"greedy outputs token-identical: {same} of {compared}{identity_words(proof)}"
    if not card.baseline:
        return f"no text was compared with plain decoding of {card.outside_engine}"
    if card.outside_engine:
        return f"{greedy}; nothing else was checked of {card.outside_engine}"
    return (
        f"{greedy}; target as its own draft: α = {proof.identity_acceptance:.3f}; "
        f"distribution test p = {proof.distribution_p_value:.3f}"
    )


def checks_table(checks: Sequence[Check]) -> Table:
    """What `check` measured, what it expected, and the verdict."""
    table = Table("check", "measured", "expected", "verdict")
    for check in checks:
        table.add_row(
            check.name, check.measured, check.expected, "ok" if check.passed else "FAILED"
        )
    return table


def difference_lines(checks: Sequence[Check]) -> list[str]:
    """Where greedy texts part, and whether rounding can decide it."""
    return [
        f"prompt {d['prompt_id']}, new token {d['position'] + 1}: "
        + (
            "one text ends here and the other does not: "
            if d["rounding"] is None
            else f"the two tokens are {d['top_two_gap']:.2g} apart, rounding is "
            f"{d['rounding']:.2g}: "
        )
        + ("a tie" if d["within_rounding"] else "NOT explained by rounding")
        for check in checks
        for d in check.figures.get("differences", [])
    ]


def _caption(rows: Sequence[Row]) -> str | None:
    notes = [f"plain slowed: {PLAIN_SLOWED}"] if any(row.slowed for row in rows) else []
    for gamma_, least in sorted({(gamma(row), row.least_reach) for row in rows if row.least_reach}):
        notes.append(f"γ {gamma_} stops early, at a least reach of {least:g}")
    return "; ".join(notes) or None
