"""Whether scorecards can be compared at all: sound ones of the same target, prompts, sampling,
engine and machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from specdistill.errors import InputError
from specdistill.run_folder import RunFolder
from specdistill.scoring.card_rows import of_setting
from specdistill.scoring.headline import gamma
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.statistics import ratio_of_sums
from specdistill.scoring.trust import NOISE, objections, round_cost, swapped_draft
from specdistill.scoring.verdict import NO_PLAIN, slow_verifying

Cards = Mapping[str, Scorecard]  # by the name they are shown under


def read_cards(paths: Sequence[Path]) -> dict[str, Scorecard]:
    """Cards by the path they were asked for; a folder holds a scorecard.json. Raises `InputError`
    for fewer than two, one named twice, or one that cannot be read.
    """
    if len(paths) < 2:
        raise InputError(f"a comparison takes at least two scorecards; got {len(paths)}")
    cards: dict[str, Scorecard] = {}
    for path in paths:
        if str(path) in cards:
            raise InputError(f"{path} is named twice; name each scorecard once")
        cards[str(path)] = Scorecard.read(card_file(path))
    return cards


def card_file(path: Path) -> Path:
    return RunFolder(path).scorecard if path.is_dir() else path


def obstacles(cards: Cards) -> list[str]:
    """Why these cards cannot be compared, a sentence each, with the field and both values; none
    where they can.
    """
    if len(cards) < 2:
        return [f"a comparison takes at least two scorecards; got {len(cards)}"]
    reasons = []
    for name, card in cards.items():
        reasons += [f"{name}: {objection}" for objection in objections(card)]
        reasons += [] if card.baseline else [f"{name}: {NO_PLAIN[0].lower()}{NO_PLAIN[1:]}"]
        file = card_file(Path(name))
        run = RunFolder(file.parent)
        if file == run.scorecard and run.draft.is_dir():
            reasons += [f"{name}: {doubt}" for doubt in swapped_draft(card.draft, run.draft)]
    reasons = reasons or _slowed(cards)
    if reasons:
        return reasons
    differing = _differing(cards, _conditions) + _no_temperature(cards)
    return differing or _baselines(cards)


def _slowed(cards: Cards) -> list[str]:
    """Cards that tell no speedup, as their plain decoding was slowed down."""
    reasons = []
    for name, card in cards.items():
        for temperature in common_temperatures(cards):
            rows = [row for row in card.rows if row.temperature == temperature]
            best = max(rows, key=lambda row: row.speedup)
            if best.slowed:
                setting = (temperature, best.num_draft_tokens)
                why = slow_verifying("a verify pass", setting, best.verify_ratio)
                reasons.append(f"{name}: {why}; score it again")
    return reasons


def _differing(cards: Cards, facts_of: Callable[[Scorecard], dict[str, str]]) -> list[str]:
    """In what the others differ from the first card, a sentence each with both values."""
    (first, one), *others = cards.items()
    facts = facts_of(one)
    return [
        f"{field} differs: {facts[field]} in {first}, {value} in {name}"
        for name, other in others
        for field, value in facts_of(other).items()
        if value != facts[field]
        # A target is the same under whatever name.
        and not (field == "target" and other.target.sha256 == one.target.sha256)
    ]


def _conditions(card: Scorecard) -> dict[str, str]:
    """What must be the same for two speeds to be comparable."""
    facts = card.provenance
    versions = facts.get("versions", {})
    engine = " ".join(filter(None, [facts.get("engine"), versions.get(facts.get("engine"))]))
    libraries = [f"{name} {versions.get(name)}" for name in ("torch", "transformers")]
    return {
        "target": f"{card.target.name} (sha256 {card.target.sha256[:12]})",
        "target dtype": card.target.dtype,
        "prompts": f"{card.rows[0].prompts} (sha256 {str(facts.get('prompts_sha256'))[:12]})",
        "turns of a conversation": facts.get("conversation_turns", "last"),
        "longest answer": f"{facts.get('max_new_tokens')} tokens",
        "sampling": card.verification.label if card.verification.lossy else "exact",
        "engine": ", ".join([engine, *libraries]),
        "deployment": json.dumps(facts.get("engine_options", {}), sort_keys=True),
        "machine": f"{facts.get('device')}, {facts.get('threads')} threads",
    }


def remarks(cards: Cards) -> list[str]:
    """In what comparable cards differ that may tell in their figures, a sentence each."""
    return _differing(cards, _circumstances)


def _circumstances(card: Scorecard) -> dict[str, str]:
    """A seed draws other texts at temperatures above 0; of more γ, the fastest is faster."""
    grid = {row.num_draft_tokens: gamma(row) for row in card.rows}
    return {
        "seed": str(card.provenance.get("seed")),
        "verification": card.verification.label or "token verification",
        "least reach": ", ".join(f"{x:g}" for x in sorted({row.least_reach for row in card.rows})),
        "the program's commit": str(card.provenance.get("git") or "unknown"),
        "drafting": card.provenance.get("speculative_config", {}).get("method") or card.drafting,
        "the draft's sampling": str(card.provenance.get("draft_sampling") or "unknown"),
        "vLLM's model runner": str(card.provenance.get("runner") or "unknown"),
        "γ": ", ".join(grid[num] for num in sorted(grid)),
    }


def common_temperatures(cards: Cards) -> list[float]:
    """Those that every card was scored at."""
    each = [{row.temperature for row in card.rows} for card in cards.values()]
    return sorted(set.intersection(*each))


def _no_temperature(cards: Cards) -> list[str]:
    if common_temperatures(cards):
        return []
    each = [
        f"{', '.join(f'{t:g}' for t in sorted({row.temperature for row in card.rows}))} in {name}"
        for name, card in cards.items()
    ]
    return [f"no temperature was scored in all: {'; '.join(each)}"]


def _baselines(cards: Cards) -> list[str]:
    """A verify pass of the target over as many proposals is the same work in every card, whatever
    the draft: where it costs a different number of plain steps, those were slowed down in one.
    """
    reasons = []
    for (one, ours), (other, theirs) in combinations(cards.items(), 2):
        for temperature, num, _ in sorted(_settings(ours) & _settings(theirs)):
            columns, others = (
                round_cost(of_setting(card.per_prompt, temperature, num)) for card in (ours, theirs)
            )
            if columns is None or others is None:
                continue
            ratio = ratio_of_sums([*columns[0], *others[1]], [*columns[1], *others[0]], seed=0)
            if ratio.high < 1 - NOISE or ratio.low > 1 / (1 - NOISE):
                slowed = one if ratio.value < 1 else other
                reasons.append(
                    f"plain decoding differs: at T = {temperature:g}, γ = {num} a round without "
                    f"its draft steps costs {ratio.value:.2f} times as many plain steps in {one} "
                    f"as in {other}, though both are the same target's; probably the plain steps "
                    f"of {slowed} were slowed down, score it again"
                )
    return reasons


def _settings(card: Scorecard) -> set[tuple[float, int, float]]:
    return {(row.temperature, row.num_draft_tokens, row.least_reach) for row in card.rows}
