"""The verdict in words: does this draft pay on this machine, at which γ, why, and what would make
it pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.card_rows import PLAIN_SLOWED, PromptRow, Row, of_setting
from specdistill.scoring.choice import Choice, Setting, choose
from specdistill.scoring.headline import gamma_is
from specdistill.scoring.scorecard import Best, Verdict, Verification
from specdistill.scoring.slices import stops_paying
from specdistill.scoring.statistics import Ratio, break_even, prompts_needed

UNKNOWN = "Whether the draft pays cannot be shown"
NO_PLAIN = "Plain decoding was not measured, so that no speedup is told"


def verdict(
    rows: Sequence[Row],
    verification: Verification | None = None,
    doubts: Sequence[str] = (),
    per_prompt: Sequence[PromptRow] = (),
    measured_again: float | None = None,
) -> Verdict:
    """Judge the fastest row, at the speedup that `choose` finds for it in `per_prompt`: it pays
    where the whole 95% interval lies above 1 and there are no doubts about the figures, in which
    case its speedup is NaN. The speed of a lossy verification is no speed of the target, and the
    reason says so first.

    That the row was `slowed` is a doubt; `measured_again` is a temperature at which a second
    measurement took the place of the first. Where plain decoding was not measured nothing is
    judged: the reason tells what was.
    """
    if not doubts and all(math.isnan(row.speedup) for row in rows):
        return _without_plain(rows)
    fastest = max(rows, key=lambda row: -math.inf if math.isnan(row.speedup) else row.speedup)
    best, how = fastest, Choice((0, 0), Ratio(math.nan, math.nan, math.nan), [], 0, 0)
    if per_prompt:
        how = choose(per_prompt)
        best = replace(fastest, speedup=how.speedup.value, speedup_ci95=how.speedup[1:])
    if fastest.slowed:
        setting = (fastest.temperature, fastest.num_draft_tokens)
        again = setting[0] == measured_again
        slow = slow_verifying("a verify pass", setting, fastest.verify_ratio, again)
        doubts = [*doubts, slow]
    needed = math.nan  # no formula knows which rounds stop early, or find nothing
    if not best.least_reach and best.drafting != "look-up":
        needed = break_even(best.acceptance_rate, best.num_draft_tokens, best.speedup)
    affordable = _break_even_cost_ratio(best)
    low, high = best.speedup_ci95
    pays = low > 1 and best.tested > 0 and not doubts
    interval = "" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    where = f"at {gamma_is(best)}, temperature {best.temperature:g}"
    measured = f"{best.speedup:.2f} times plain decoding{interval} {where}"
    if how.words:
        measured += f" ({how.words})"
    why = f"acceptance rate {best.acceptance_rate:.2f}"
    why += "" if math.isnan(needed) else f" against a break-even of {needed:.2f}"
    if math.isfinite(best.cost_ratio):  # outside engines do not tell
        alone = ", one a round," if best.drafting == "parallel" else ""
        why += (
            f", a draft step{alone} costs {best.cost_ratio:.2f} and a verify pass "
            f"{best.verify_ratio:.2f} of a plain step"
        )
    judged = judgement(best, pays)
    if not best.tested:
        none = "no answer was long enough"
        if best.drafting == "look-up":
            none = "nothing to propose was found in the texts"
        reason = f"{UNKNOWN}: no draft token was tested, as {none} {where}."
    elif doubts:
        reason = f"These figures cannot be trusted: {'; '.join(doubts)}."
    elif judged == UNKNOWN:
        judged = f"{judged} with {prompts(best.prompts)}"
        reason = f"{judged}: {measured}; {why}.{_more_prompts(best)}"
    else:
        remedy = f" {_remedy(best, needed, affordable)}".rstrip()
        if pays:
            setting = (best.temperature, best.num_draft_tokens)
            remedy = _limit(of_setting(per_prompt, *setting))
        reason = f"{judged}: {measured}; {why}.{remedy}"
    if verification is not None and verification.lossy:
        reason = f"{verification.label}: the text is not the target's. {reason}"
    return Verdict(
        pays,
        Best(best.temperature, best.num_draft_tokens, math.nan if doubts else best.speedup),
        needed,
        reason,
        affordable,
        (math.nan, math.nan) if doubts else best.speedup_ci95,
        how.chosen_on,
        how.judged_on,
    )


def _without_plain(rows: Sequence[Row]) -> Verdict:
    each = "; ".join(
        f"at {gamma_is(row)}, temperature {row.temperature:g} an acceptance rate of "
        f"{row.acceptance_rate:.2f}, {row.block_efficiency:.2f} tokens a round and "
        f"{row.tokens_per_second:.1f} tokens/s"
        for row in rows
    )
    reason = f"{NO_PLAIN}: {each}."
    best = Best(rows[0].temperature, rows[0].num_draft_tokens, math.nan)
    return Verdict(False, best, math.nan, reason)


def slow_verifying(what: str, setting: Setting, ratio: float, measured_again: bool = False) -> str:
    """`what` took `ratio` plain steps, too few."""
    again = ", also when it was measured again" if measured_again else ""
    return (
        f"T = {setting[0]:g}, γ = {setting[1]}: {what} took {ratio:.2f} of a plain step{again}; "
        f"{PLAIN_SLOWED}"
    )


def judgement(best: Row, pays: bool) -> str:
    """The verdict on the fastest row in a few words."""
    if pays:
        return "The draft pays"
    if best.tested and best.speedup_ci95[1] < 1:
        return "The draft does not pay"
    return "The draft is not shown to pay" if best.tested and best.speedup < 1 else UNKNOWN


def _break_even_cost_ratio(row: Row) -> float:
    """A round costs τ / speedup plain steps, of which its draft steps take c each; to cost τ, c
    must be so.
    """
    if not row.draft_steps:
        return math.nan
    excess = row.block_efficiency / row.speedup - row.block_efficiency
    return row.cost_ratio - excess / row.draft_steps


def _remedy(row: Row, needed: float, affordable: float) -> str:
    """Empty where nobody knows."""
    if row.drafting == "look-up":
        return ""
    higher = f"an acceptance rate above {needed:.2f}"
    cheaper = f"a draft step below {affordable:.3f} of a plain step"
    if math.isnan(needed):
        return f"It would pay with {cheaper}." if affordable > 0 else "No cheaper draft would do."
    if needed < 1 and affordable > 0:
        times = row.cost_ratio / affordable
        return f"It would pay with {higher}, or with {cheaper} ({times:.1f} times cheaper)."
    if math.isnan(affordable):
        return f"It would pay with {higher}." if needed < 1 else "No acceptance rate would do."
    if needed < 1:
        return f"It would pay with {higher}; no cheaper draft alone would do."
    if affordable > 0:
        return f"It would pay with {cheaper}; no acceptance rate alone would do."
    return (
        "Neither a free draft nor one whose every token is accepted would pay at this γ: a round "
        "costs too much here."
    )


def _limit(per_prompt: Sequence[PromptRow]) -> str:
    """Where a draft that pays on the whole does not: from a length of prompts on."""
    band = stops_paying(per_prompt)
    if band is None:
        return ""
    low, high = band.speedup_ci95
    return (
        f" From prompts of {band.category} on it no longer pays: {band.speedup:.2f} times plain "
        f"decoding [{low:.2f}, {high:.2f}] there."
    )


def _more_prompts(row: Row) -> str:
    needed = prompts_needed(Ratio(row.speedup, *row.speedup_ci95), row.prompts)
    return f" About {math.ceil(needed):,} prompts would show it." if math.isfinite(needed) else ""


def prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count:,} prompts"


def identity_words(proof: Lossless) -> str:
    """In which dtype greedy texts were compared, what rounding explains, and what float32 shows."""
    same, compared = proof.greedy_identical
    words = f" in {proof.dtype}" if proof.dtype else ""
    if same < compared:
        ties = sum(bool(tie["within_rounding"]) for tie in proof.ties)
        each = (
            "each difference a rounding tie"
            if same + ties == compared
            else (f"{ties} of the differences rounding ties")
        )
        words += f", {each}"
    if proof.float32 is not None:
        same, compared = proof.float32.greedy_identical
        missing = proof.float32.missing
        words += (
            f"; not shown in float32: {missing}"
            if missing
            else (f"; {same} of {compared} in float32")
        )
    return words
