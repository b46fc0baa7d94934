"""The verdict in words: does this draft pay on this machine, at which γ, and why."""

from __future__ import annotations

from collections.abc import Sequence

from specdistill.scoring.scorecard import Best, Row, Verdict, Verification
from specdistill.scoring.statistics import break_even


def verdict(rows: Sequence[Row], verification: Verification | None = None) -> Verdict:
    """Judge by the fastest row: it pays where its whole 95% interval lies above 1. The speed of a
    lossy verification is no speed of the target, and the reason says so first.
    """
    best = max(rows, key=lambda row: row.speedup)
    needed = break_even(best.num_draft_tokens, best.cost_ratio, best.verify_ratio)
    low, high = best.speedup_ci95
    pays = low > 1
    measured = (
        f"{best.speedup:.2f} times plain decoding [{low:.2f}, {high:.2f}] at γ = "
        f"{best.num_draft_tokens}, "
        f"temperature {best.temperature:g}"
    )
    why = (
        f"acceptance rate {best.acceptance_rate:.2f} against a break-even of {needed:.2f}, a "
        "draft step costs "
        f"{best.cost_ratio:.2f} and a verify pass {best.verify_ratio:.2f} of a plain step"
    )
    if pays:
        reason = f"The draft pays: {measured}; {why}."
    elif high < 1 or best.speedup < 1:
        reason = f"The draft does not pay: {measured}; {why}."
    else:
        unknown = f"Whether the draft pays cannot be shown with {best.prompts} prompts"
        reason = f"{unknown}: {measured}; {why}."
    if verification is not None and verification.lossy:
        reason = f"{verification.label}: the text is not the target's. {reason}"
    return Verdict(
        pays, Best(best.temperature, best.num_draft_tokens, best.speedup), needed, reason
    )
