"""The last launch of `verify` and of `sample` in Triton: accept a prefix, then draw by a race.

Every program of a request repeats the decision, which needs few numbers, and races over its own
part of the vocabulary. The one that finishes last compares the winners of the parts and writes the
result: no further launch, and the order in which they finish does not matter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.accept import decide, draft_row, taken
from specdistill_kernels.verification.rows import (
    INF,
    INTS,
    NOWHERE,
    numbers,
    offered,
    probability,
    row_first_maximum,
    row_max,
    row_min,
    row_statistics,
    row_sum,
    some,
    warped,
)
from specdistill_kernels.verification.triton_noise import (
    DRAFT,
    FINAL,
    exponential,
    random_bits,
    stream,
)

NONE = tl.constexpr(-3.0e38)  # below every score


@triton.jit
def _duel(p, left, bits):
    """A score for each token, highest wins: left / E where something is left; below all of those
    -E / p, the race of p itself, for the rows where nothing is left of any token."""
    e = exponential(bits)
    above = left > 0.0
    score = tl.where(above, left, e) / tl.where(above, e, tl.where(p > 0.0, p, 1.0))
    return tl.where(above, score, tl.where(p > 0.0, -score, NONE))


@triton.jit
def _winner(best, at, ROWS: tl.constexpr):
    """The highest score of each row and its lowest token."""
    top = row_max(best, ROWS)
    return top, row_min(tl.where(best == top, at, NOWHERE), ROWS)


@triton.jit
def _race(
    row, of_draft, words, part_of, SUBTRACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The race over one part of the vocabulary, of joint p, less q where SUBTRACT: the peak that
    scores are relative to, the winner's score, the winner; and the mass if not SUBTRACT.

    A row that has statistics is `known`, and its scores are absolute. Another is scored against the
    highest logit so far, since a race needs no normaliser.
    """
    base, need, width, scale, known, peak, mass, cut, joint = row
    shift, key = words
    start, stop = part_of
    highest = tl.where(known, peak, -INF)
    best = tl.full((ROWS, BLOCK), NONE, tl.float32)
    winner = tl.full((ROWS, BLOCK), NOWHERE, tl.int32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for at in range(start, stop, BLOCK):
        c = (at + tl.arange(0, BLOCK))[None, :]
        x = warped(base + c, need & (c < width), scale, cut)
        higher = tl.maximum(highest, row_max(x, ROWS))
        higher = tl.where(known, peak, higher)
        anchor = tl.where(tl.abs(higher) < INF, higher, 0.0)
        fade = tl.exp(highest - anchor)
        highest = higher
        p = probability(x, anchor, mass) * joint
        if SUBTRACT:
            q_row, sure, token = of_draft
            left = p - taken(q_row, c, width, scale, sure, token)
        else:
            left = p
            total = total * fade + p
        score = _duel(p, left, random_bits(shift, key, c))
        best *= fade
        winner = tl.where(score > best, c, winner)
        best = tl.maximum(best, score)
    score, winner = _winner(tl.where(winner == NOWHERE, NONE, best), winner, ROWS)
    return tl.where(known, 0.0, highest), score, winner, row_sum(total, ROWS)


@triton.jit
def _store_part(at, result, ok, SUBTRACT: tl.constexpr, SP: tl.constexpr):
    """What `_race` found, in the four planes [B, 4, SP] of the race; the winner is an int32."""
    peak, score, winner, mass = result
    tl.store(at, peak, mask=ok)
    tl.store(at + SP, score, mask=ok)
    tl.store((at + 2 * SP).to(tl.pointer_type(tl.int32), bitcast=True), winner, mask=ok)
    if not SUBTRACT:
        tl.store(at + 3 * SP, mass, mask=ok)


@triton.jit
def _last_to_arrive(arrived, b, ok, splits):
    """Whether all other parts of request b have stored their results; then they can be read."""
    tl.debug_barrier()
    return ok & (tl.atomic_add(arrived + b, 1, mask=ok, sem="acq_rel") == splits - 1)


@triton.jit
def _overall_winner(race, b, last, splits, SP: tl.constexpr, ROWS: tl.constexpr):
    """The token that won over all parts, -1 where there is none; the highest peak of a part, and
    the factors that bring the parts, each of which scored against its own peak, to that one."""
    k = tl.arange(0, SP)[None, :]
    mask = last & (k < splits)
    at = race + b * (4 * SP) + k
    parts = tl.load(at, mask=mask, other=-INF)
    score = tl.load(at + SP, mask=mask, other=NONE)
    winner = tl.load(
        (at + 2 * SP).to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=NOWHERE
    )
    peak = row_max(parts, ROWS)
    good = tl.abs(peak) < INF
    factor = tl.exp(parts - tl.where(good, peak, 0.0))
    _, token = _winner(tl.where(winner == NOWHERE, NONE, score * factor), winner, ROWS)
    return tl.where(good & (token != NOWHERE), token, -1), peak, factor


@triton.jit(do_not_specialize=INTS)
def verdict_kernel(
    target,
    draft,
    tokens,
    lengths,
    temperature,
    certain,
    inverse,
    draft_lse,
    seeds,
    steps,
    peaks,
    masses,
    firsts,
    cuts,
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
    part_tiles,
    splits,
    has_q,
    has_certain,
    has_lse,
    trimmed,
    filtered,
    block_mode,
    power,
    divisor,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The verdict on each request. Grid: blocks of requests, parts of the vocabulary."""
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    rows = (peaks, masses, cuts, splits)
    b = numbers(ROWS).to(tl.int64)
    part = tl.program_id(1)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    greedy = ok & (t == 0.0)
    warm = ok & ~greedy
    scale = tl.where(warm, t, 1.0)
    seed = tl.load(seeds + b, mask=ok, other=0)
    step = tl.load(steps + b, mask=ok, other=0)
    sure = tl.load(certain + b, mask=ok & (has_certain != 0), other=0) != 0
    sure = sure | (has_q == 0)
    end = offered(tokens, lengths, b, ok, num, GP, ROWS)
    request = (tokens, b, end, scale, sure | greedy, batch, num, filtered)
    options = (inverse, trimmed, draft_lse, has_lse)
    kept, joint = decide(
        p_side,
        q_side,
        rows,
        request,
        options,
        (seed, step, greedy),
        firsts,
        block_mode,
        (power, divisor),
        GP,
        SP,
        ROWS,
    )

    # After a rejection the token comes from norm(max(0, joint p - q)), otherwise from p.
    rejected = warm & (kept < end)
    known = rejected | (warm & (filtered != 0))
    row = b * (num + 1) + kept
    peak, mass, cut = row_statistics(rows, row, known, filtered, SP, ROWS)
    mass = tl.where(known, mass, 1.0)
    q_row = draft_row(q_side, rows, request, options, kept, rejected, SP, ROWS)
    token = tl.load(tokens + b * num + kept, mask=rejected, other=0)
    base = target + b * (target_b * UNIT) + kept * (target_g * UNIT)
    width = width_units * UNIT
    row_of = (base, warm, width, scale, known, peak, mass, cut, joint.to(tl.float32))
    of_draft = (q_row, sure & rejected, token)
    words = stream(seed, step, kept, FINAL)
    start = part * part_tiles * BLOCK
    part_of = (start, tl.minimum(start + part_tiles * BLOCK, width) * some(warm, ROWS))
    result = _race(row_of, of_draft, words, part_of, True, ROWS, BLOCK)
    _store_part(race + b * (4 * SP) + part, result, ok, True, SP)

    last = _last_to_arrive(arrived, b, ok, splits)
    drawn, _, _ = _overall_winner(race, b, last, splits, SP, ROWS)
    first = row_first_maximum(peaks, firsts, row, greedy, splits, SP, ROWS)
    drawn = tl.where(greedy, first, drawn)
    tl.store(out_accepted + b, kept, mask=last)
    for start in range(0, num + 1, GP):
        g = (start + tl.arange(0, GP))[None, :]
        prefix = tl.load(tokens + b * num + g, mask=last & (g < kept), other=-1)
        emitted = tl.where(g == kept, drawn, prefix)
        tl.store(out_tokens + b * (num + 1) + g, emitted, mask=last & (g <= num))


@triton.jit(do_not_specialize=INTS)
def sample_kernel(
    logits,
    temperature,
    seeds,
    steps,
    peaks,
    masses,
    firsts,
    cuts,
    logsumexps,
    race,
    arrived,
    out_tokens,
    out_lse,
    batch,
    width_units,
    target_b,
    part_tiles,
    splits,
    filtered,
    position,
    UNIT: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One draw from each row, with its logsumexp. Grid: blocks of rows, parts of the vocabulary."""
    rows = (peaks, masses, cuts, splits)
    b = numbers(ROWS).to(tl.int64)
    part = tl.program_id(1)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    greedy = ok & (t == 0.0)
    warm = ok & ~greedy
    scale = tl.where(warm, t, 1.0)
    seed = tl.load(seeds + b, mask=ok, other=0)
    step = tl.load(steps + b, mask=ok, other=0)
    known = warm & (filtered != 0)
    peak, mass, cut = row_statistics(rows, b, known, filtered, SP, ROWS)
    mass = tl.where(known, mass, 1.0)
    base = logits + b * (target_b * UNIT)
    width = width_units * UNIT
    row_of = (base, warm, width, scale, known, peak, mass, cut, 1.0)
    words = stream(seed, step, step * 0 + position, DRAFT)
    start = part * part_tiles * BLOCK
    part_of = (start, tl.minimum(start + part_tiles * BLOCK, width) * some(warm, ROWS))
    result = _race(row_of, None, words, part_of, False, ROWS, BLOCK)
    _store_part(race + b * (4 * SP) + part, result, ok, False, SP)

    last = _last_to_arrive(arrived, b, ok, splits)
    drawn, highest, factor = _overall_winner(race, b, last, splits, SP, ROWS)
    first = row_first_maximum(peaks, firsts, b, greedy, splits, SP, ROWS)
    tl.store(out_tokens + b, tl.maximum(tl.where(greedy, first, drawn), 0), mask=last)
    k = tl.arange(0, SP)[None, :]
    at = race + b * (4 * SP) + 3 * SP + k
    masses_of_parts = tl.load(at, mask=last & (k < splits), other=0.0)
    mass = row_sum(masses_of_parts * factor, ROWS)
    good = (tl.abs(highest) < INF) & (mass > 0.0)
    lse = tl.where(good, highest + tl.log(tl.where(good, mass, 1.0)), float("nan"))
    lse = tl.where(known, tl.load(logsumexps + b, mask=last & known, other=0.0), lse)
    tl.store(out_lse + b, tl.where(greedy, 0.0, lse), mask=last)
