"""README.md of an exported draft, in the form that model hubs read: what it is, how to serve it,
and every fact of its scorecard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import yaml

from specdistill.demo import DEMO
from specdistill.drafts.serve_commands import name_elsewhere
from specdistill.models import LanguageModel
from specdistill.quoting import prose
from specdistill.scoring.card_rows import Row
from specdistill.scoring.headline import gamma, gamma_is, number, speedup, trained_line
from specdistill.scoring.load import Drafted, Plain
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.served import served_lines
from specdistill.scoring.verdict import identity_words

LICENCES = {DEMO: "Apache-2.0"}  # of targets that SpecDistill itself offers
ELSEWHERE = (  # facts of a card that have a sentence or a table of their own
    "versions",
    "draft_origin",
    "trained_prompts",
    "runners",
    "schedule",
)


def readme(
    draft: LanguageModel,
    target: str,
    card: Scorecard | None,
    serve: str,
    both_ways: str | None,
    leaked: float,
) -> str:
    """With the block of Markdown `serve`, and the section on a parallel draft's `both_ways`."""
    outside = name_elsewhere(target)
    licence = LICENCES.get(target)
    head: dict[str, object] = {"library_name": "transformers"}
    head["tags"] = ["speculative-decoding", "draft-model"]
    head |= {"base_model": outside} if outside != "TARGET" else {}
    head |= {"license": licence.lower()} if licence else {}
    vocabulary = f"{draft.full_vocab_size:,} tokens"
    if draft.vocab is not None:
        vocabulary += (
            f", of which it proposes {draft.vocab_size:,}; all others together take "
            f"{leaked:.1e} of its probability"
        )
    licensed = (
        f"{licence}, the licence of its target"
        if licence
        else "that of its target, whose weights "
        "and answers it is made of; put the target's licence beside this file before you pass it on"
    )
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# A draft for {prose(outside)}",
        "A small model that proposes tokens for speculative decoding; the target decides, so the "
        "output stays the target's. It is no model to talk to. Made with SpecDistill.",
        f"- Parameters: {draft.model.num_parameters():,} as trained, {draft.num_layers} layers\n"
        f"- Vocabulary: {vocabulary}\n"
        f"- Licence: {licensed}",
        f"## Serve it\n\n{serve}",
        *([] if both_ways is None else [both_ways]),
        *([] if card is None else _measured(card)),
    ]
    if card is None:
        parts.append("It has not been scored.")
    return "\n\n".join(parts) + "\n"


def _measured(card: Scorecard) -> list[str]:
    return [_figures(card), _settings(card), *_slices(card), *_load(card), _facts(card)]


def _figures(card: Scorecard) -> str:
    """The fastest setting at each temperature, where it was measured, and the verdict."""
    temperatures = sorted({row.temperature for row in card.rows})
    table = _table(
        ("T", "γ", "acceptance rate α", "tokens per target call τ", "speedup [95% interval]"),
        [_line(card.best_row(t)) for t in temperatures],
    )
    facts = {"device": "unknown", "threads": "unknown", "date": "date unknown"} | card.provenance
    device, threads, date = (prose(str(facts[name])) for name in ("device", "threads", "date"))
    ours = f"SpecDistill {card.provenance.get('versions', {}).get('specdistill', '')}".strip()
    same, compared = card.lossless.greedy_identical
    identical = f"{same} of {compared} greedy texts were identical to plain decoding"
    identical += identity_words(card.lossless)
    if not compared:
        identical = "no greedy text was compared with plain decoding"
    label = f" ({prose(card.settings_label)})" if card.settings_label else ""
    words = [card.verdict.reason, *served_lines(card), trained_line(card)]
    return (
        f"## Measured{label}\n\n{table}\n\n"
        f"By {prose(card.outside_engine or ours)} with {card.rows[0].prompts} prompts on {device}, "
        f"{threads} threads, {prose(card.target.dtype)}, {date}; {prose(identical)}. Other engines "
        "and machines have other speeds, and on another kind of prompts a draft accepts less.\n\n"
        + "\n\n".join(prose(sentence) for sentence in words if sentence)
    )


def _line(row: Row) -> list[str]:
    rates = number(row.acceptance_rate, 3), number(row.block_efficiency, 2)
    return [f"{row.temperature:g}", gamma(row), *rates, speedup(row)]


def _settings(card: Scorecard) -> str:
    """Every setting, judged on all prompts."""
    plain = {base.temperature: base.tokens_per_second for base in card.baseline}
    rows = sorted(card.rows, key=lambda row: (row.temperature, row.num_draft_tokens))
    lines = [
        [
            *_line(row),
            f"{row.tokens_per_second:.1f}",
            number(plain.get(row.temperature, math.nan), 1),
            _shares(row.acceptance_by_position),
            number(row.acceptance_rate_expected, 3),
            number(row.cost_ratio, 3),
            number(row.verify_ratio, 2),
            number(row.mbsu, 2),
        ]
        for row in rows
    ]
    rates = "T", "γ", "α", "τ", "speedup", "tokens/s", "plain"
    head = (*rates, "accepted by place", "expected α", "c", "v", "MBSU")
    return (
        f"## All settings\n\n{_table(head, lines)}\n\n"
        "Accepted by place: the share at each place of a round, of those rounds that accepted all "
        "places before it. Expected α: the mean of Σ min(p, q). c and v: the time of a draft step "
        "and of a verify pass, in plain steps. MBSU: the speedup if only the weights that are read "
        "took time."
    )


def _slices(card: Scorecard) -> list[str]:
    """The verdict's setting by category and by length of prompts, where there are several."""
    sections = []
    for what, rows in {
        "category": card.slices("by_category"),
        "length": card.slices("by_prompt_length"),
    }.items():
        lines = [
            [
                prose(row.category),
                str(row.prompts),
                number(row.acceptance_rate, 3),
                number(row.block_efficiency, 2),
                speedup(row),
            ]
            for row in rows
        ]
        if lines:
            head, best = (what, "prompts", "α", "τ", "speedup [95% interval]"), card.verdict_row()
            title = f"## By {what} of prompts, T = {best.temperature:g}, {gamma_is(best)}"
            sections.append(f"{title}\n\n{_table(head, lines)}")
    return sections


def _load(card: Scorecard) -> list[str]:
    """Several requests at a time, where that was measured."""
    rows: list[Plain | Drafted] = [*card.load.plain, *card.load.drafted]
    if not rows:
        return []
    lines = []
    for row in sorted(rows, key=lambda row: (row.temperature, row.concurrency)):
        if isinstance(row, Plain):
            rates = " ".join(f"{rate:.1f}" for rate in row.tokens_per_second)
            figures, accepted = ("plain", rates, "1"), "–"
        else:
            rates = f"{row.tokens_per_second:.1f}"
            figures = str(row.num_draft_tokens), rates, number(row.speedup, 2)
            accepted = _shares(row.accepted_by_position)
        where = f"{row.temperature:g}", str(row.concurrency)
        lines.append([*where, *figures, *_milliseconds(row), accepted])
    head = ("T", "at a time", "γ", "tokens/s", "speedup", "ms to the first token", "ms per token")
    return [
        f"## Several requests at a time\n\n{_table((*head, 'accepted by place'), lines)}\n\n"
        "Times are medians, with the 95th percentile. Accepted by place: the share of all rounds. "
        + " ".join(map(prose, card.load.lines))
    ]


def _shares(by_place: Sequence[float]) -> str:
    return " ".join(f"{share:.2f}" for share in by_place) or "–"


def _milliseconds(row: Plain | Drafted) -> list[str]:
    """To the first token, and for each of the others."""
    times = row.first_token_seconds, row.seconds_per_token
    return [f"{number(1e3 * x.median, 1)} ({number(1e3 * x.p95, 1)})" for x in times]


def _facts(card: Scorecard) -> str:
    """What else the card says of how it was measured."""
    versions = card.provenance.get("versions", {})
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **{name: value for name, value in card.provenance.items() if name not in ELSEWHERE},
        "target": f"{card.target.name}, weights sha256 {card.target.sha256}",
        "draft": f"{card.draft.name}, weights as scored sha256 {card.draft.sha256}",
    }
    if trained := card.provenance.get("trained_prompts"):
        facts["trained on"] = f"{trained['prompts']} prompts, {trained['scored']} of those scored"
    if origin := card.provenance.get("draft_origin"):
        made = f"step {origin.get('step')}, configuration sha256 {origin.get('config_sha256')}"
        facts["made by"] = f"a run of SpecDistill, {made}"
    proof = card.lossless
    facts["target's own tokens accepted, as its own draft"] = proof.identity_acceptance
    facts["p-value of the tests of sampled tokens"] = proof.distribution_p_value
    lines = [f"- {prose(name)}: {prose(_value(value))}" for name, value in facts.items()]
    return "## How it was measured\n\n" + "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
