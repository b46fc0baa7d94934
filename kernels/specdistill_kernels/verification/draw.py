"""The last launch of `verify` and of `sample` in Triton: a draw by a race.

Every program races over its own tokens of a row. The one that finishes last compares the winners of
all and writes the result: no further launch, and the order in which they finish does not matter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.accept import DECISION, taken
from specdistill_kernels.verification.rows import (
    INF,
    INTS,
    NOWHERE,
    numbers,
    probability,
    row_max,
    row_min,
    row_sum,
    rsqrt,
    some,
    warped,
)
from specdistill_kernels.verification.triton_noise import (
    DRAFT,
    exponential,
    random_bits,
    stream,
)

# Scores of what is left of p after q, and of p itself: any of the former above 2**-86 beats all of
# the latter, and neither leaves the range of float32 over an exponential of 2**-33 to 24.
LEFT, WHOLE = tl.constexpr(2.0**90), tl.constexpr(2.0**-30)


@triton.jit
def _winner(score, token, ROWS: tl.constexpr):
    """The highest score of each row and its lowest token; NOWHERE where none is above 0."""
    top = row_max(score, ROWS)
    winner = row_min(tl.where(score == top, token, NOWHERE), ROWS)
    return top, tl.where(top > 0.0, winner, NOWHERE)


@triton.jit
def _score(weight, shift, key, token):
    """weight / E, of which the highest wins."""
    root = rsqrt(exponential(random_bits(shift, key, token)))
    return weight * root * root


@triton.jit
def _store_part(at, part, parts, peak, score, winner, ok):
    """What a program found, in the planes [B, 4, parts] of the race; the winner is an int32."""
    tl.store(at + part, peak, mask=ok)
    tl.store(at + parts + part, score, mask=ok)
    at = (at + 2 * parts + part).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(at, winner, mask=ok)


@triton.jit
def _last_to_arrive(arrived, ok, splits):
    """Whether all other parts of a row have stored their results; then they can be read."""
    tl.debug_barrier()
    return ok & (tl.atomic_add(arrived, 1, mask=ok, sem="acq_rel") == splits - 1)


@triton.jit
def _overall_winner(at, last, splits, greedy, RP: tl.constexpr, ROWS: tl.constexpr):
    """The token that won over all parts, -1 where there is none; the highest peak of a part, and
    the factors that bring the parts, each of which scored against its own peak, to that one (all
    or nothing in greedy rows)."""
    k = tl.arange(0, RP)[None, :]
    mask = last & (k < splits)
    parts = tl.load(at + k, mask=mask, other=-INF)
    score = tl.load(at + splits + k, mask=mask, other=0.0)
    at = (at + 2 * splits + k).to(tl.pointer_type(tl.int32), bitcast=True)
    winner = tl.load(at, mask=mask, other=NOWHERE)
    peak = row_max(parts, ROWS)
    good = tl.abs(peak) < INF
    factor = tl.exp(parts - tl.where(good, peak, 0.0))
    factor = tl.where(greedy, tl.where(parts == peak, 1.0, 0.0), factor)
    _, token = _winner(tl.where(winner == NOWHERE, 0.0, score * factor), winner, ROWS)
    return tl.where(good & (token != NOWHERE), token, -1), peak, factor


@triton.jit(do_not_specialize=INTS)
def race_kernel(
    target,
    draft,
    tokens,
    temperature,
    certain,
    inverse,
    decisions,
    race,
    arrived,
    out_tokens,
    out_accepted,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    has_q,
    has_certain,
    trimmed,
    filtered,
    UNIT: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token after what `decide_kernel` keeps of a sampled request: from max(0, joint p - q) at
    a rejection, otherwise from p. Grid: blocks of requests, parts of the vocabulary."""
    b = numbers(ROWS).to(tl.int64)
    part = tl.program_id(1)
    splits = tl.num_programs(1)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    ok = ok & (t > 0.0)
    if some(ok, ROWS) > 0:
        inv_t = 1.0 / tl.where(ok, t, 1.0)
        kept = tl.load(out_accepted + b, mask=ok, other=0)
        at = decisions + b * DECISION
        peak = tl.load(at, mask=ok, other=0.0)
        mass = tl.load(at + 1, mask=ok, other=0.0)
        cut = tl.load(at + 2, mask=ok, other=0.0)
        joint = tl.load(at + 3, mask=ok, other=0.0)
        q_peak = tl.load(at + 4, mask=ok, other=0.0)
        q_mass = tl.load(at + 5, mask=ok, other=0.0)
        q_cut = tl.load(at + 6, mask=ok, other=0.0)
        rejected = ok & (tl.load(at + 7, mask=ok, other=0.0) > 0.0)
        words = (at + 8).to(tl.pointer_type(tl.uint32), bitcast=True)
        shift = tl.load(words, mask=ok, other=0)
        key = tl.load(words + 1, mask=ok, other=0)
        sure = tl.load(certain + b, mask=rejected & (has_certain != 0), other=0) != 0
        sure = rejected & (sure | (has_q == 0))
        token = tl.load(tokens + b * num + kept, mask=rejected, other=0)
        base = target + b * (target_b * UNIT) + kept * (target_g * UNIT)
        q_base = draft + b * (draft_b * UNIT) + kept * (draft_g * UNIT)
        width = width_units * UNIT
        q_width = draft_width_units * UNIT
        q_row = (q_base, rejected & ~sure, q_width, q_peak, q_mass, q_cut, inverse, trimmed)

        # A row that has statistics is known, and its scores are absolute. Another is scored
        # against the highest logit of the part, since a race needs no normaliser.
        known = rejected | (ok & (filtered != 0))
        c = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
        x = warped(base + c, ok & (mass > 0.0) & (c < width), inv_t, cut, filtered)
        highest = mass * 0.0
        if some(ok & ~known, ROWS) > 0:
            highest = tl.where(known, 0.0, row_max(tl.where(x == x, x, INF), ROWS))
        anchor = tl.where(known, peak, tl.where(tl.abs(highest) < INF, highest, 0.0))
        weight = probability(x, anchor, mass / joint)
        if some(rejected, ROWS) > 0:
            left = weight - taken(q_row, c, width, inv_t, filtered, sure, token, ROWS)
            weight = tl.where(left > 0.0, left * LEFT, weight * WHOLE)
        score, winner = _winner(_score(weight, shift, key, c), c, ROWS)
        at = race + b * (4 * splits)
        _store_part(at, part, splits, highest, score, winner, ok)

        last = _last_to_arrive(arrived + b, ok, splits)
        if some(last, ROWS) > 0:
            drawn, _, _ = _overall_winner(at, last, splits, False, RP, ROWS)
            tl.store(out_tokens + b * (num + 1) + kept, drawn, mask=last)


@triton.jit(do_not_specialize=INTS)
def sample_kernel(
    target,
    temperature,
    seeds,
    steps,
    peaks,
    masses,
    cuts,
    logsumexps,
    race,
    arrived,
    out_tokens,
    out_lse,
    batch,
    num,
    width_units,
    target_b,
    target_g,
    filtered,
    position,
    UNIT: tl.constexpr,
    SP: tl.constexpr,
    RP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One draw from each of num + 1 rows of a request, at places of the round from `position` on,
    with its logsumexp. Grid: blocks of rows, parts of the vocabulary."""
    row = numbers(ROWS).to(tl.int64)
    b = row // (num + 1)
    g = row % (num + 1)
    part = tl.program_id(1)
    splits = tl.num_programs(1)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    greedy = ok & (t == 0.0)
    inv_t = 1.0 / tl.where(greedy | ~ok, 1.0, t)
    seed = tl.load(seeds + b, mask=ok, other=0)
    step = tl.load(steps + b, mask=ok, other=0)
    known = ok & ~greedy & (filtered != 0)
    peak = tl.load(peaks + row * SP, mask=known, other=0.0)
    mass = tl.load(masses + row * SP, mask=known, other=1.0)
    cut = tl.load(cuts + row, mask=known, other=-INF)

    c = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
    base = target + b * (target_b * UNIT) + g * (target_g * UNIT)
    x = warped(base + c, ok & (mass > 0.0) & (c < width_units * UNIT), inv_t, cut, filtered)
    highest = tl.where(known, 0.0, row_max(x, ROWS))
    anchor = tl.where(known, peak, tl.where(tl.abs(highest) < INF, highest, 0.0))
    p = probability(x, anchor, mass)
    total = row_sum(p, ROWS)
    shift, key = stream(seed, step, g + position, DRAFT)
    score = _score(p, shift, key, c)
    if some(greedy, ROWS) > 0:
        score = tl.where(greedy, tl.where(x == highest, 1.0, 0.0), score)
    score, winner = _winner(score, c, ROWS)
    highest = tl.where(total == total, highest, INF)  # a NaN spoils its row, as +inf does
    at = race + row * (4 * splits)
    _store_part(at, part, splits, highest, score, winner, ok)
    tl.store(at + 3 * splits + part, total, mask=ok)

    last = _last_to_arrive(arrived + row, ok, splits)
    if some(last, ROWS) > 0:
        drawn, highest, factor = _overall_winner(at, last, splits, greedy, RP, ROWS)
        tl.store(out_tokens + row, tl.maximum(drawn, 0), mask=last)
        k = tl.arange(0, RP)[None, :]
        sums = tl.load(at + 3 * splits + k, mask=last & (k < splits), other=0.0)
        mass = row_sum(sums * factor, ROWS)
        good = (tl.abs(highest) < INF) & (mass > 0.0)
        lse = tl.where(good, highest + tl.log(tl.where(good, mass, 1.0)), float("nan"))
        lse = tl.where(known, tl.load(logsumexps + row, mask=last & known, other=0.0), lse)
        tl.store(out_lse + row, tl.where(greedy, 0.0, lse), mask=last)
