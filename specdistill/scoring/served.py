"""What a card found of how to serve: by which model runner of vLLM, with which γ at which load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdistill.scoring.scorecard import Scorecard


@dataclass(frozen=True)
class Served:
    """The faster model runner where both were measured, ranges [first, last, γ] of requests under
    way, see `Load.schedule`, and how proposals are drawn where some were sampled, as vLLM calls it;
    None where there is nothing to say. `engine_options` are more arguments of vLLM's engine.
    """

    runner: str | None = None
    schedule: Sequence[Sequence[int]] = ()
    sampling: str | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, card: Scorecard) -> Served:
        facts = card.provenance
        sampled = any(row.temperature for row in card.rows) and card.drafting != "look-up"
        usual = None if facts.get("engine") == "vllm" else "probabilistic"  # a server does not say
        sampling = facts.get("draft_sampling", usual) if sampled else None
        return cls(
            facts.get("runner") if facts.get("runners") else None,
            facts.get("schedule", ()),
            None if sampling == "greedy" else sampling,  # vLLM's own default
            facts.get("engine_options", {}),
        )


def served_lines(card: Scorecard) -> list[str]:
    """Sentences on the runners and the schedule; none where neither was measured."""
    served, lines = Served.of(card), []
    if served.runner is not None:
        runners = card.provenance["runners"]
        best_plain = max(each["plain_tokens_per_second"] for each in runners)
        rate = max(each["tokens_per_second"] for each in runners)
        each = "; ".join(
            f"{each['runner']}: {each['tokens_per_second']:.1f} at γ = {each['num_draft_tokens']}, "
            f"T = {each['temperature']:g}, and {each['plain_tokens_per_second']:.1f} plainly"
            for each in runners
        )
        lines.append(
            f"With the draft vLLM's model runner {served.runner} is the faster one (tokens per "
            f"second by {each}): {rate / best_plain:.2f} times the faster plain decoding."
        )
    if served.schedule:
        parts = [
            f"{f'{first} to {last}' if first < last else first}: "
            + (f"γ = {num}" if num else "no draft")
            for first, last, num in served.schedule
        ]
        lines.append(f"By requests under way the fastest are {', '.join(parts)}, and so on.")
    return lines
