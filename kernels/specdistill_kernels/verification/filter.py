"""Top-k, top-p and min-p in Triton: each row's cut, found by passes over the raw logits.

No probability is written and nothing is sorted. The rule is that of `probabilities`: temperature,
top-k, renormalise, top-p, min-p, renormalise; what ties with a threshold is kept.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.rows import (
    INF,
    INTS,
    offered,
    row_max,
    row_min,
    row_of_program,
    row_statistics,
    row_sum,
    some,
)

LOWEST = tl.constexpr(-0x7F800001)  # the key of -inf
HIGHEST = tl.constexpr(0x7F800000)  # the key of +inf


@triton.jit
def _key(x):
    """float32 to int32 of the same order; -0 and 0 share one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _smallest_with(key, SHIFT: tl.constexpr):
    """The smallest float32 whose key, shifted, is `key`."""
    whole = (key << SHIFT).to(tl.int32)
    bits = tl.where(whole < 0, whole ^ 0x7FFFFFFF, whole)
    return tl.where(key <= (LOWEST >> SHIFT), -INF, bits.to(tl.float32, bitcast=True))


@triton.jit
def _tally(
    row,
    need,
    pivots,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many logits of a row lie at or above each pivot [R, P], and their mass."""
    base, width, scale, peak = row
    counts = tl.zeros((ROWS, PIVOTS, BLOCK), tl.int32)
    masses = tl.zeros((ROWS, PIVOTS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        c = (start + tl.arange(0, BLOCK))[None, :]
        raw = tl.load(base + c, mask=need & (c < width), other=-INF).to(tl.float32)
        w = tl.exp(raw / scale - peak)
        above = (_key(raw) >> SHIFT)[:, None, :] >= pivots[:, :, None]
        counts += above.to(tl.int32)
        masses += tl.where(above, w[:, None, :], 0.0)
    return tl.sum(counts, 2), tl.sum(masses, 2)


@triton.jit
def _threshold(
    row,
    need,
    mass,
    k,
    p,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold key of top-k and then top-p, and the mass at or above it.

    Both keep all logits from a threshold on: the largest at or above which there are k logits, then
    the largest at or above which there is p of their mass. A bracket [low, high) that holds it is
    searched with PIVOTS keys at a time, order-preserving integers of 16 bits for bfloat16. The
    first pivots lie 2 nats apart below the peak; the later ones divide the bracket evenly, by turns
    in value, which is quick, and in keys, which ends: half of all keys lie between -1 and 1. It is
    narrow enough when it holds one key or one logit, or when just k logits are above it.
    """
    _, width, scale, peak = row
    nothing = k * 0
    low = nothing.to(tl.int64) + (LOWEST >> SHIFT)
    count = nothing + width
    j = (1 + tl.arange(0, PIVOTS))[None, :]
    top = peak * scale
    for phase in range(2):
        by_mass = (nothing + phase) == 1
        goal = p * mass
        high = nothing.to(tl.int64) + (HIGHEST >> SHIFT)
        above = nothing  # the number of logits at or above high
        active = need & tl.where(by_mass, p < 1.0, (k > 0) & (k < width)) & (count > 1)
        turn = nothing
        while some(active, ROWS) > 0:
            least = tl.maximum(_smallest_with(low, SHIFT), top - 9.0 * PIVOTS * scale)
            most = tl.minimum(_smallest_with(high, SHIFT), top)
            even = least + (most - least) * (j / (PIVOTS + 1.0))
            value = tl.where(turn == 0, top - 2.0 * j * scale, even)
            pivots = low + (high - low) * j // (PIVOTS + 1)
            by_value = (turn == 0) | (turn % 2 == 1)
            pivots = tl.where(by_value, (_key(value) >> SHIFT).to(tl.int64), pivots)
            pivots = tl.maximum(tl.minimum(pivots, high - 1), low + 1)
            counts, masses = _tally(row, active, pivots.to(tl.int32), SHIFT, PIVOTS, ROWS, BLOCK)
            enough = tl.where(by_mass, (masses >= goal) & (masses > 0.0), counts >= k)
            new_low = row_max(tl.where(active & enough, pivots, low), ROWS)
            here = active & enough & (pivots == new_low)
            moved = row_max(here.to(tl.int32), ROWS) > 0
            count = tl.where(moved, row_max(tl.where(here, counts, 0), ROWS), count)
            mass = tl.where(moved, row_max(tl.where(here, masses, 0.0), ROWS), mass)
            new_high = row_min(tl.where(active & ~enough, pivots, high), ROWS)
            here = active & ~enough & (pivots == new_high)
            moved = row_max(here.to(tl.int32), ROWS) > 0
            above = tl.where(moved, row_max(tl.where(here, counts, 0), ROWS), above)
            low = new_low
            high = new_high
            active = active & (high - low > 1) & (count - above > 1) & (by_mass | (count != k))
            turn += 1
    return low, mass


@triton.jit
def _min_p(row, need, cut, mass, floor, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Cut and mass after min-p, where `floor` is above 0: one more pass."""
    base, width, scale, peak = row
    wanted = need & (floor > 0.0)
    if some(wanted, ROWS) > 0:
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        least = tl.full((ROWS, BLOCK), INF, tl.float32)
        for start in range(0, width, BLOCK):
            c = (start + tl.arange(0, BLOCK))[None, :]
            raw = tl.load(base + c, mask=wanted & (c < width), other=-INF).to(tl.float32)
            w = tl.exp(raw / scale - peak)
            kept = (raw >= cut) & (w >= floor)
            sums += tl.where(kept, w, 0.0)
            least = tl.where(kept, tl.minimum(least, raw), least)
        mass = tl.where(wanted, row_sum(sums, ROWS), mass)
        cut = tl.where(wanted, row_min(least, ROWS), cut)
    return cut, mass


@triton.jit(do_not_specialize=INTS)
def filter_kernel(
    target,
    draft,
    tokens,
    lengths,
    temperature,
    certain,
    top_k,
    top_p,
    min_p,
    peaks,
    masses,
    cuts,
    logsumexps,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    splits,
    has_certain,
    has_k,
    has_p,
    has_min,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each sampled row's cut, with its mass replaced by that of what the cut keeps, and the
    logsumexp it had before. Grid: blocks of rows; a program goes over its rows alone.
    """
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    base, width, row, b, g, is_draft = row_of_program(p_side, q_side, batch, num, ROWS)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    warm = ok & (t > 0.0)
    scale = tl.where(warm, t, 1.0)
    sure = tl.load(certain + b, mask=ok & is_draft & (has_certain != 0), other=0) != 0
    end = offered(tokens, lengths, b, ok, num, GP, ROWS)
    need = warm & ~sure & ((g < end) | ((g == end) & (is_draft == 0)))

    peak, mass, _ = row_statistics((peaks, masses, cuts, splits), row, need, 0, SP, ROWS)
    good = need & (mass > 0.0)
    lse = peak + tl.log(tl.where(good, mass, 1.0))
    tl.store(logsumexps + row, tl.where(good, lse, float("nan")), mask=need)
    k = tl.load(top_k + b, mask=ok & (has_k != 0), other=0).to(tl.int32)
    p = tl.load(top_p + b, mask=ok & (has_p != 0), other=1.0)
    floor = tl.load(min_p + b, mask=ok & (has_min != 0), other=0.0)
    of_row = (base, width, scale, peak)
    key, mass = _threshold(of_row, good, mass, k, p, SHIFT, PIVOTS, ROWS, BLOCK)
    cut, mass = _min_p(of_row, good, _smallest_with(key, SHIFT), mass, floor, ROWS, BLOCK)
    tl.debug_barrier()  # no thread may still be reading the parts that are replaced here
    part = tl.arange(0, SP)[None, :]
    store = good & (part < splits)
    tl.store(peaks + row * SP + part, tl.where(part == 0, peak, -INF), mask=store)
    tl.store(masses + row * SP + part, tl.where(part == 0, mass, 0.0), mask=store)
    tl.store(cuts + row, cut, mask=need)
