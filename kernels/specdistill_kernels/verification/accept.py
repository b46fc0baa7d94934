"""The acceptance rules of `reference` in Triton, on the few numbers they need.

Inside, `request` is (tokens, b, end, inv_t, sure, batch, num, filtered): `end` [R, 1] proposals
count, `sure` marks requests whose draft proposes with certainty (and greedy ones, which never look
at the draft's logits). `draft_options` is (inverse, trimmed, draft_lse, has_lse).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.rows import (
    INF,
    INTS,
    first_maximum,
    numbers,
    offered,
    probability,
    row_first_maximum,
    row_min,
    row_statistics,
    row_sum,
    single,
    some,
    statistics,
    warped,
)
from specdistill_kernels.verification.triton_noise import COIN, FINAL, random_bits, stream

DECISION = tl.constexpr(16)  # words of a request, for the race


@triton.jit
def draft_statistics(rows, draft_lse, has_lse, row, at, need, filtered, SP: tl.constexpr):
    """As `statistics`; a stored logsumexp [B, G] is a peak of mass 1."""
    stored = (has_lse != 0) & (filtered == 0)
    peak, mass, cut = statistics(rows, row, need & (stored == 0), filtered, SP)
    if stored:
        lse = tl.load(draft_lse + at, mask=need, other=0.0)
        good = tl.abs(lse) < INF
        peak = tl.where(good, lse, 0.0)
        mass = tl.where(good, 1.0, 0.0)
    return peak, mass, cut


@triton.jit
def _chances(p_side, q_side, rows, request, draft_options, g, SP: tl.constexpr):
    """The proposals at positions g [1, K] of requests b [R, 1], with their p and q: [R, K]."""
    target, target_b, target_g, width = p_side
    draft, draft_b, draft_g, _ = q_side
    tokens, b, end, inv_t, sure, batch, num, filtered = request
    inverse, trimmed, draft_lse, has_lse = draft_options
    live = g < end
    token = tl.load(tokens + b * num + g, mask=live, other=0)
    inside = live & (token < width)
    peak, mass, cut = statistics(rows, b * (num + 1) + g, live, filtered, SP)
    good = inside & (mass > 0.0)
    x = warped(target + b * target_b + g * target_g + token, good, inv_t, cut, filtered)
    p_x = probability(x, peak, mass)

    asked = inside & ~sure
    column = token
    if trimmed != 0:
        column = tl.load(inverse + token, mask=asked, other=-1).to(tl.int64)
    asked = asked & (column >= 0)
    at = b * num + g
    row = batch * (num + 1) + at
    peak, mass, cut = draft_statistics(rows, draft_lse, has_lse, row, at, asked, filtered, SP)
    good = asked & (mass > 0.0)
    x = warped(draft + b * draft_b + g * draft_g + column, good, inv_t, cut, filtered)
    q_x = probability(x, peak, mass)
    return token, p_x, tl.where(sure, 1.0, q_x)


@triton.jit
def _coins(seed, step, g):
    """Uniform in [0, 1), float64, for positions g [1, K]."""
    shift, key = stream(seed, step, g, COIN)
    return random_bits(shift, key, g * 0).to(tl.float64) * 2.3283064365386963e-10


@triton.jit
def _ratios(p_x, q_x, live):
    """p / q in float64, to 1e-14: a division would be a call, for which registers are spilled."""
    q = tl.maximum(q_x, 1.0e-30)
    guess = (1.0 / q).to(tl.float64)
    inverse = guess * (2.0 - q.to(tl.float64) * guess)
    return tl.where(live & (q_x > 0.0), p_x.to(tl.float64) * inverse, 0.0)


@triton.jit
def _pick(values, here, ROWS: tl.constexpr):
    """The one column of [R, K] that `here` [1, K] marks."""
    return row_sum(tl.where(here, values, 0.0), ROWS)


@triton.jit
def _joint_before(
    p_side,
    q_side,
    rows,
    request,
    draft_options,
    i,
    GP: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The joint ratio of the first i proposals, float64: see `reference.block_rule`."""
    _, _, end, _, _, _, num, _ = request
    joint = (i * 0).to(tl.float64) + 1.0
    for start in range(0, num, GP):
        g = (start + tl.arange(0, GP))[None, :]
        _token, p_x, q_x = _chances(p_side, q_side, rows, request, draft_options, g, SP)
        ratios = _ratios(p_x, q_x, g < end)
        for j in range(GP):
            next_joint = tl.minimum(joint * _pick(ratios, g == start + j, ROWS), 1.0)
            joint = tl.where(start + j < i, next_joint, joint)
    return joint


@triton.jit
def decide(
    p_side,
    q_side,
    rows,
    request,
    draft_options,
    draws,
    firsts,
    block_mode,
    lenience,
    GP: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """How many proposals each request keeps, by `reference.token_rule`, `reference.block_rule` or
    the greedy rule, and the joint ratio that scales p in the residual, float64."""
    _, b, end, _, _, batch, num, _ = request
    seed, step, greedy = draws
    power, divisor = lenience
    peaks, masses, _, splits = rows
    kept = end
    longest = end * 0
    joint = longest.to(tl.float64) + 1.0
    chosen = joint
    for start in range(0, num, GP):
        g = (start + tl.arange(0, GP))[None, :]
        token, p_x, q_x = _chances(p_side, q_side, rows, request, draft_options, g, SP)
        coins = _coins(seed, step, g)
        bar = tl.exp(power * tl.log(tl.where(p_x > 0.0, p_x, 1.0)))
        bar = tl.where(power == 1.0, p_x, tl.where(p_x > 0.0, bar, 0.0)) / divisor
        accept = (q_x > 0.0) & (coins * q_x.to(tl.float64) < bar.to(tl.float64))
        best = first_maximum(peaks, firsts, b * (num + 1) + g, greedy & (g < end), splits, SP)
        accept = tl.where(greedy, best == token, accept)
        stop = tl.where((g < end) & ~accept, g, num)
        kept = tl.minimum(kept, row_min(stop, ROWS))
        if block_mode != 0:
            ratios = _ratios(p_x, q_x, g < end)
            k = tl.arange(0, SP)[None, None, :]
            at = (batch * (2 * num + 1) + b * num + g + 1)[:, :, None] * SP + k
            mask = (g + 1 < end)[:, :, None] & (k < splits)
            excess = tl.sum(tl.load(masses + at, mask=mask, other=0.0), 2).to(tl.float64)
            for j in range(GP):
                here = g == start + j
                i = start + j + 1
                joint = tl.minimum(joint * _pick(ratios, here, ROWS), 1.0)
                mass = _pick(excess, here, ROWS)  # S_i
                rest = mass + 1.0 - joint
                u = _pick(coins, here, ROWS)  # below S / (S + 1 - joint), which is 1 for 0 / 0
                below = tl.where(rest > 0.0, u * rest < mass, joint > 0.0)
                below = tl.where(i == end, u < joint, below)
                stands = ~greedy & (i <= end) & below
                longest = tl.where(stands, i, longest)
                chosen = tl.where(stands, joint, chosen)
    return tl.where(greedy | (block_mode == 0), kept, longest), chosen


@triton.jit
def taken(q_row, c, width, inv_t, filtered, sure, token, ROWS: tl.constexpr):
    """What the draft proposed over tokens c [1, BLOCK]: q, or all of it at the one token."""
    base, asked, draft_width, peak, mass, cut, inverse, trimmed = q_row
    asked = asked & (mass > 0.0)
    if trimmed != 0:
        column = tl.load(inverse + c, mask=c < width, other=-1)
        x = warped(base + column, asked & (column >= 0), inv_t, cut, filtered)
    else:
        x = warped(base + c, asked & (c < draft_width), inv_t, cut, filtered)
    q = probability(x, peak, mass)
    if some(sure, ROWS) > 0:
        q = tl.where(sure & (c == token), 1.0, q)
    return q


@triton.jit
def draft_row(q_side, rows, request, draft_options, g, need, SP: tl.constexpr, ROWS: tl.constexpr):
    """What `taken` asks for, for the draft's rows at positions g, a column."""
    draft, draft_b, draft_g, width = q_side
    _, b, _, _, sure, batch, num, filtered = request
    inverse, trimmed, draft_lse, has_lse = draft_options
    asked = need & ~sure
    at = b * num + g + tl.zeros((ROWS, 1), tl.int64)
    some = asked & (at >= 0)
    row = batch * (num + 1) + at
    peak, mass, cut = draft_statistics(rows, draft_lse, has_lse, row, at, some, filtered, SP)
    base = draft + b * draft_b + g * draft_g
    peak = single(peak, ROWS)
    mass = single(mass, ROWS)
    return base, asked, width, peak, mass, single(cut, ROWS), inverse, trimmed


@triton.jit(do_not_specialize=INTS)
def decide_kernel(
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
    decisions,
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
):
    """What each request keeps and, of greedy ones, the token after it; of the others what the race
    for that token needs, in `decisions`. Grid: blocks of requests."""
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    rows = (peaks, masses, cuts, splits)
    b = numbers(ROWS).to(tl.int64)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    greedy = ok & (t == 0.0)
    warm = ok & ~greedy
    inv_t = 1.0 / tl.where(warm, t, 1.0)
    seed = tl.load(seeds + b, mask=ok, other=0)
    step = tl.load(steps + b, mask=ok, other=0)
    sure = tl.load(certain + b, mask=ok & (has_certain != 0), other=0) != 0
    sure = sure | (has_q == 0)
    end = offered(tokens, lengths, 1, b, ok, num, GP, ROWS)
    request = (tokens, b, end, inv_t, sure | greedy, batch, num, filtered)
    options = (inverse, trimmed, draft_lse, has_lse)
    draws = (seed, step, greedy)
    lenience = (power, divisor)
    kept, joint = decide(
        p_side, q_side, rows, request, options, draws, firsts, block_mode, lenience, GP, SP, ROWS
    )

    # After a rejection the token comes from norm(max(0, joint p - q)), otherwise from p.
    rejected = warm & (kept < end)
    known = rejected | (warm & (filtered != 0))
    row = b * (num + 1) + kept
    peak, mass, cut = row_statistics(rows, row, known, filtered, SP, ROWS)
    q_row = draft_row(q_side, rows, request, options, kept, rejected, SP, ROWS)
    _, _, _, q_peak, q_mass, q_cut, _, _ = q_row
    at = decisions + b * DECISION
    tl.store(at, peak, mask=ok)
    tl.store(at + 1, tl.where(known, mass, 1.0), mask=ok)
    tl.store(at + 2, cut, mask=ok)
    tl.store(at + 3, tl.where(rejected, joint, 1.0).to(tl.float32), mask=ok)
    tl.store(at + 4, q_peak, mask=ok)
    tl.store(at + 5, q_mass, mask=ok)
    tl.store(at + 6, q_cut, mask=ok)
    tl.store(at + 7, tl.where(rejected, 1.0, 0.0), mask=ok)
    shift, key = stream(seed, step, kept, FINAL)
    words = (at + 8).to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(words, shift, mask=ok)
    tl.store(words + 1, key, mask=ok)

    first = row_first_maximum(peaks, firsts, row, greedy, splits, SP, ROWS)
    tl.store(out_accepted + b, kept, mask=ok)
    for start in range(0, num + 1, GP):
        g = (start + tl.arange(0, GP))[None, :]
        prefix = tl.load(tokens + b * num + g, mask=ok & (g < kept), other=-1)
        emitted = tl.where((g == kept) & greedy, first, prefix)
        tl.store(out_tokens + b * (num + 1) + g, emitted, mask=ok & (g <= num))


@triton.jit(do_not_specialize=INTS)
def excess_kernel(
    target,
    draft,
    tokens,
    lengths,
    temperature,
    certain,
    inverse,
    draft_lse,
    peaks,
    masses,
    cuts,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    splits,
    has_q,
    has_certain,
    has_lse,
    trimmed,
    filtered,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block verification's S_i = sum of max(0, joint_i p - q) at positions i = 1 to G-1, over one
    part of the vocabulary; row (b, i) of it follows the draft's rows in `masses`. Grid: blocks of
    rows, parts."""
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    rows = (peaks, masses, cuts, splits)
    row = numbers(ROWS)
    part = tl.program_id(1)
    b = (row // (num - 1)).to(tl.int64)
    i = row % (num - 1) + 1
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    ok = ok & (t > 0.0)
    inv_t = 1.0 / tl.where(ok, t, 1.0)
    sure = tl.load(certain + b, mask=ok & (has_certain != 0), other=0) != 0
    sure = sure | (has_q == 0)
    end = offered(tokens, lengths, 1, b, ok, num, GP, ROWS)
    need = ok & (i < end)
    request = (tokens, b, end, inv_t, sure, batch, num, filtered)
    options = (inverse, trimmed, draft_lse, has_lse)
    joint = _joint_before(p_side, q_side, rows, request, options, i, GP, SP, ROWS).to(tl.float32)

    q_row = draft_row(q_side, rows, request, options, i, need, SP, ROWS)
    at = b * num + i
    token = tl.load(tokens + at, mask=need, other=0)
    peak, mass, cut = row_statistics(rows, b * (num + 1) + i, need, filtered, SP, ROWS)
    base = target + b * (target_b * UNIT) + i * (target_g * UNIT)
    width = width_units * UNIT
    c = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
    x = warped(base + c, need & (mass > 0.0) & (c < width), inv_t, cut, filtered)
    left = probability(x, peak, mass / joint)
    left -= taken(q_row, c, width, inv_t, filtered, sure & need, token, ROWS)
    at = (batch * (2 * num + 1) + at) * SP + part
    tl.store(masses + at, row_sum(tl.maximum(left, 0.0), ROWS), mask=need)
