"""The words of a report, section by section, as Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from specdistill.quoting import block, code, prose, visible
from specdistill.report.serving import serving
from specdistill.run_folder import RunFolder
from specdistill.scoring.card_rows import PLAIN_SLOWED, CategoryRow, ModelCard, Row
from specdistill.scoring.choice import chosen
from specdistill.scoring.headline import (
    gamma,
    gamma_is,
    labelled,
    number,
    speedup,
    trained_line,
)
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.verdict import NO_PLAIN, identity_words, judgement

CAPTIONS = {
    "speedup.png": "Speedup over plain decoding by number of draft tokens γ, with 95% intervals. "
    "What the measurement falls short of the predicted curve is overhead.",
    "acceptance.png": "Left: acceptance rate by γ, before distillation in grey. "
    "Right: acceptance by position within a round, with 95% intervals, wide where few rounds came "
    "so far.",
    "survival.png": "How far rounds get: the share in which at least so many draft tokens were "
    "accepted. Dotted: what the draft's α would give if acceptance were independent.",
    "time.png": "What the time of one emitted token is spent on.",
    "load.png": "Speedup over plain decoding by the number of requests at a time. Filled marks: "
    "the draft was faster than every plain run.",
    "text.png": "One answer, the first prompt's, in the fastest setting: every token is the "
    "draft's, or the target's after a rejection, or a bonus.",
    "training.png": "The loss during training, and what it bought on held-out prompts.",
}
PNG = b"\x89PNG\r\n\x1a\n"  # how every such file begins
WORDS = """\
- **T**: sampling temperature, 0 is greedy. **γ**: draft tokens proposed in one round.
- **α**, acceptance rate: accepted / tested draft tokens; tested are those up to and including the \
first rejected one of each round. **Expected α**: mean of Σ min(p, q) over the tested positions, \
p and q being the target's and the draft's probabilities. **Accepted / proposed** is another \
number: it counts tokens that were never tested, as vLLM's counters do.
- **τ**, block efficiency: tokens emitted per target call; plain decoding is 1.
- **c** and **v**: time of one draft step, and of one verify pass, in plain target steps.
- **Speedup**: tokens per second with the draft / tokens per second of the same engine without it. \
**Predicted**: τ / (γc + v), from measured times. **Planned**: the closed form that assumes \
independent acceptance and a free verify pass.
- **MBSU**: τ / (γ · bytes read by the draft / bytes read by the target + 1); no clock in it."""


def document(
    card: Scorecard,
    before: Scorecard | None,
    metrics: Sequence[dict[str, Any]],
    config: str,
    target: str,
    run_dir: Path,
) -> str:
    """The whole report. `config` is the text of config.yaml, `target` what it calls the target.
    Raises `InputError` for a card without the row its verdict names.
    """
    best = card.verdict_row()
    fastest_first = sorted(card.slices("by_category"), key=lambda row: -row.speedup)
    sections = [
        _verdict(card, best, target),
        _what_was_done(card, best, target, metrics),
        _before_after(card, before),
        _slices("category of prompts", fastest_first, best),
        _slices("length of prompts", card.slices("by_prompt_length"), best),
        _all_settings(card),
        _lossless(card),
        _pictures(RunFolder(run_dir).plots),
        serving(card, best, target, RunFolder(run_dir).draft),
        _limits(card, best),
        _how_measured(card),
        f"## Configuration\n\n{block(config.strip(), 'yaml')}" if config else "",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def title(card: Scorecard, target: str) -> str:
    """The report's, as plain text."""
    words = f"A draft for {visible(target)}"
    return f"{words} ({visible(card.label)})" if card.label else words


def _verdict(card: Scorecard, best: Row, target: str) -> str:
    low, high = (number(end, 2) for end in best.speedup_ci95)
    speed = (
        f"with it, {code(target)} decodes {number(best.speedup, 2)} times as fast as without it "
        f"(T = {best.temperature:g}, {gamma_is(best)}; 95% interval {low} to {high})"
    )
    if not card.baseline:
        speed = f"{code(target)} was not decoded without it, so that there is no speedup to tell"
    elif math.isnan(best.speedup):
        speed = "the measurement is wrong, so that there is no speedup to tell"
    proof = "and the output does not change"
    if card.verification.lossy:
        proof = f"but the output is not the target's ({prose(card.verification.label)})"
    elif not card.lossless.holds:
        proof = "but that the output does not change was NOT shown"
    judged = "FAILED" if card.failures else judgement(best, card.verdict.pays)
    return (
        f"# {labelled(f'A draft for {prose(target)}', card, prose)}\n\n"
        f"**{judged}: {speed}, {proof}.**\n\n"
        f"Why: {prose(' '.join([card.verdict.reason, *card.load.lines]))}"
        + (f"\n\n**But {prose(trained)}.**" if (trained := trained_line(card)) else "")
    )


def _what_was_done(
    card: Scorecard, best: Row, target: str, metrics: Sequence[dict[str, Any]]
) -> str:
    last = metrics[-1] if metrics else {}
    trained = [f"{last['tokens']:,} tokens seen"] if "tokens" in last else []
    trained += [_duration(last["seconds"])] if "seconds" in last else []
    against = ", against the target alone" if card.baseline else ""
    return "\n".join(
        [
            "## What was done\n",
            "A small draft model for one target and one kind of prompts was scored by real "
            f"speculative decoding: every round counted and timed{against}.\n",
            f"- Target: {code(target)}, {_size(card.target)}",
            f"- Draft: {code(card.draft.name)}, {_size(card.draft)}",
            f"- Training: {', '.join(trained) or 'the run folder holds no record of it'}",
            f"- Prompts: {best.prompts} per setting; {best.emitted:,} tokens emitted at the best",
        ]
    )


def _size(model: ModelCard) -> str:
    return (
        f"{model.parameters / 1e6:,.1f} M parameters, {model.weight_bytes / 1e6:,.1f} MB read per "
        f"token, {prose(model.dtype)}, vocabulary {model.vocab_size:,}"
    )


def _before_after(card: Scorecard, before: Scorecard | None) -> str:
    # No tokens/s here: the machine may have been slower in one of the two scorings.
    head = ["T", "draft", "γ", "expected α", "α", "τ", "speedup [95% interval]"]
    lines = []
    gains = []
    for temperature in sorted({row.temperature for row in card.rows}):
        t = f"{temperature:g}"
        lines.append([t, "none", "–", "–", "–", "1.00", "1.00"])
        old_rows = [row for row in before.rows if row.temperature == temperature] if before else []
        if before and old_rows:
            name = labelled("before distillation", before, prose)
            lines.append([t, name, *_headline(before.best_row(temperature))])
        name = labelled("this draft", card, prose)
        lines.append([t, name, *_headline(card.best_row(temperature))])
        for old, new in product(old_rows, card.rows):
            if (new.temperature, gamma(new)) == (temperature, gamma(old)):
                before_after = old.acceptance_rate_expected, new.acceptance_rate_expected
                change = " to ".join(number(value, 2) for value in before_after)
                gains.append(f"{change} at T = {t}, γ = {new.num_draft_tokens}")
    note = "Each line shows the γ that was fastest at that temperature."
    if gains and before and before.verification == card.verification:
        note += f" At equal γ, distillation took expected α from {'; from '.join(gains)}."
    if before is None:
        note += " There is no scorecard from before distillation in the run folder."
    title = "Before and after" if before else "Result"
    return f"## {title}\n\n{_table(head, lines)}\n\n{note}"


def _headline(row: Row) -> list[str]:
    return [
        gamma(row),
        number(row.acceptance_rate_expected, 3),
        number(row.acceptance_rate, 3),
        number(row.block_efficiency, 2),
        speedup(row),
    ]


def _slices(what: str, rows: Sequence[CategoryRow], best: Row) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        rate, block = number(row.acceptance_rate, 3), number(row.block_efficiency, 2)
        lines.append([_cell(row.category), str(row.prompts), rate, block, speedup(row)])
    head = [what.split()[0], "prompts", "α", "τ", "speedup [95% interval]"]
    return (
        f"## By {what}\n\n{_table(head, lines)}\n\nAt T = {best.temperature:g}, "
        f"{gamma_is(best)}, the fastest setting of all prompts together."
    )


def _all_settings(card: Scorecard) -> str:
    head = ["T", "γ", "expected α", "α", "τ", "tokens/s", "speedup [95% interval]", "predicted"]
    head += ["planned", "MBSU", "c", "v", "accepted / proposed", "rounds"]
    lines = [
        [
            f"{row.temperature:g}",
            *_headline(row)[:-1],
            number(row.tokens_per_second, 1),
            speedup(row),
            number(row.predicted_speedup, 2),
            number(row.planned_speedup, 2),
            number(row.mbsu, 2),
            number(row.cost_ratio, 3),
            number(row.verify_ratio, 2),
            number(row.acceptance_per_proposal, 3),
            f"{row.rounds:,}",
        ]
        for row in sorted(card.rows, key=lambda row: (row.temperature, row.num_draft_tokens))
    ]
    words, label = WORDS, prose(card.verification.label)
    for num, least in sorted({(r.num_draft_tokens, r.least_reach) for r in card.rows}):
        if least:
            words += (
                f"\n- **γ ≤ {num}**: at most so many; drafting stops once all of a proposal is "
                f"accepted with a chance below {least:g}, by the draft's own probabilities."
            )
    if any(row.slowed for row in card.rows):
        words += f"\n- **Plain slowed**: {PLAIN_SLOWED}."
    if card.drafting == "parallel":
        words += (
            "\n- **Parallel draft**: one pass proposes all γ tokens of a round, so a round takes "
            "one draft step: predicted is τ / (c + v), and planned and MBSU count one step, too. "
            "What it proposes later in a round is guessed without the tokens before it."
        )
    if card.verification.lossy:
        words += (
            f"\n- **{label}**: a draft token is kept with probability "
            "min(1, f(p)/q) instead of min(1, p/q), with f(p) = p/ε (lin), p/ε² (sq) or p^ε (exp); "
            "expected α is then the mean of Σ min(f(p), q)."
        )
    elif label:
        words += (
            f"\n- **{label.capitalize()}**: a round's draft tokens are accepted "
            "as a whole, with the same distribution as one by one; α then says nothing of "
            "Σ min(p, q), so there is no expected α."
        )
    return f"## {labelled('All settings', card, prose)}\n\n{_table(head, lines)}\n\n{words}"


def _lossless(card: Scorecard) -> str:
    proof, label = card.lossless, prose(card.verification.label)
    if card.verification.lossy:
        return (
            "## Does the output stay the same?\n\n"
            f"**No: {label}.** The lenience accepts draft tokens more often than "
            "the target's distribution allows, so the output follows neither the target nor the "
            "draft, and its quality has to be judged on its own. Score without `--lenience` for "
            "the speed of a lossless draft."
        )
    same, compared = proof.greedy_identical
    rounding = sum(bool(tie["within_rounding"]) for tie in proof.ties)
    faults = compared - same - rounding
    greedy = "no outputs were compared."
    if compared:
        words = prose(identity_words(proof))
        greedy = f"{same} of {compared} outputs are token-identical to plain decoding{words}."
    if rounding:
        greedy += (
            f" Rounding decides {rounding}: where the texts part, each took the best token of its "
            "own pass, and one pass over several tokens rounds otherwise than several over one."
        )
    if faults:
        greedy += f" **Nothing explains {faults}: do not serve this before the fault is found.**"
    evidence = [
        f"- Greedy decoding (T = 0): {greedy}",
        "- The target as its own draft: of the tokens tested, it accepted "
        f"{number(100 * proof.identity_acceptance, 2)}% (100% but for rounding).",
        "- Sampling: tests of the tokens drawn against the target's probabilities give "
        f"p = {number(proof.distribution_p_value, 3)}; only a p near 0 speaks against it.\n",
        f"In sum, the output is {'' if proof.holds else '**not shown to be** '}lossless.",
    ]
    if engine := prose(card.outside_engine):
        evidence[1:] = [
            f"\nNothing else was checked of {engine}; `specdistill check` tests the "
            "pair in SpecDistill's own engine."
        ]
    lines = [
        "## Does the output stay the same?\n",
        "The draft proposes, the target decides: the output follows the target's distribution "
        "whatever the draft is. That was checked on this pair:\n",
        *evidence,
    ]
    if proof.ties:
        columns = list(dict.fromkeys(key for tie in proof.ties for key in tie))
        cells = [[_cell(tie.get(column, "")) for column in columns] for tie in proof.ties]
        head = [prose(column.replace("_", " ")) for column in columns]
        lines.append(f"\nWhere texts part:\n\n{_table(head, cells)}")
    return "\n".join(lines)


def drawn_pictures(folder: Path) -> list[str]:
    """Names of the pictures in `folder` that SpecDistill drew: no link to a file elsewhere, nor a
    file that is no picture.
    """
    return [name for name in CAPTIONS if _is_picture(folder / name)]


def _is_picture(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(PNG)) == PNG


def _pictures(folder: Path) -> str:
    names = drawn_pictures(folder)
    pictures = [f"![{CAPTIONS[name]}](plots/{name})\n\n{CAPTIONS[name]}" for name in names]
    return "\n\n".join(["## Pictures", *pictures]) if pictures else ""


def _limits(card: Scorecard, best: Row) -> str:
    device = prose(str(card.provenance.get("device", "device unknown")))
    other = []
    if label := prose(card.verification.label):
        other = [
            f"- How tokens were accepted: {label}. The programs above have their "
            "own ways, so their acceptance and speed differ."
        ]
    still = "" if card.verification.lossy else "the output is still the target's, but "
    return "\n".join(
        [
            "## Limits\n",
            *other,
            f"- Measured on this machine ({device}) with {best.prompts} prompts. Other hardware "
            "and other engines have other costs, and large batches leave less to gain.",
            f"- The 95% intervals are a paired bootstrap over {best.prompts} prompts: they cover "
            "the choice of prompts, not another workload or another machine.",
            *_chosen(card),
            f"- A draft is made for a workload. On other prompts {still}acceptance and speedup may "
            "be much lower.",
        ]
    )


def _chosen(card: Scorecard) -> list[str]:
    """How the best γ was come by."""
    verdict = card.verdict
    if words := chosen(verdict.chosen_on, verdict.judged_on):
        return [
            f"- Of the fastest setting: {words}. In the table of all settings each is judged on "
            "all prompts, so that the best looks a little better than it is."
        ]
    if len(card.rows) > 1:
        return ["- The best γ was picked on the prompts it is reported for: a little flattering."]
    return []


def _how_measured(card: Scorecard) -> str:
    facts = dict(card.provenance)
    versions = facts.pop("versions", {})
    turns = facts.pop("turns", "prompt by prompt, in one process")
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts.pop("trained_prompts", None)  # the verdict says it
    facts["target weights"] = f"sha256 {card.target.sha256}"
    facts["draft weights"] = f"sha256 {card.draft.sha256}"
    if origin := facts.pop("draft_origin", None):
        made = f"of step {origin.get('step')}, configuration {origin.get('config_sha256')}"
        facts["draft weights"] += f", {made}"
    stalls = ""
    if "stalls" in facts:  # not in older cards
        stalls = (
            "Plain decoding came before and after every prompt's drafts. A step that took three "
            "times as long as the usual one counts as usual: stalls is the share of time left out "
            "so, and steal what others had of the processors. "
        )
    how = (
        f"Runs with and without the draft took turns, {prose(turns)}, so that drift of the machine "
    )
    how += f"cancels. {stalls}"
    if not card.baseline:
        how = f"{NO_PLAIN}. "
    return f"## How it was measured\n\n{how}scorecard.json holds every figure.\n\n" + "\n".join(
        f"- {_name(name)}: {_cell(value)}" for name, value in facts.items()
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    return "–" if value is None else prose(str(value))


def _name(text: str) -> str:
    """At the beginning of a line, where more than in its middle has a meaning."""
    words = r"[^\W_]\w*( [^\W_]\w*)*"
    return text if re.fullmatch(words, text) and not text[0].isdigit() else code(text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
