"""The search for a filter's threshold in Triton, a bracket of keys that rounds of counting narrow.

A search is (phase, goal, low, high, count, above, mass, mass_above, collected), of which there is
one per row and round: phase 0 searches for top-k, 1 for top-p, 2 has ended; goal is k or a mass;
count logits of that mass lie at or above low, `above` of mass_above at or above high. Masses are
integers, in units of 2**-40 of the peak's, so that the order of additions does not matter.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.rows import INF, row_max, row_min, some

LOWEST = tl.constexpr(-0x7F800001)  # the key of -inf
HIGHEST = tl.constexpr(0x7F800000)  # the key of +inf
UNITS = tl.constexpr(2.0**40)
TALLIES, FILLED = tl.constexpr(64), tl.constexpr(128)  # where they begin among a row's words


@triton.jit
def key_of(x):
    """float32 to int32 of the same order; -0 and 0 share one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def smallest_with(key, SHIFT: tl.constexpr):
    """The smallest float32 whose key, shifted, is `key`."""
    whole = (key << SHIFT).to(tl.int32)
    bits = tl.where(whole < 0, whole ^ 0x7FFFFFFF, whole)
    return tl.where(key <= (LOWEST >> SHIFT), -INF, bits.to(tl.float32, bitcast=True))


@triton.jit
def floor_key_of(floor, peak, scale, SHIFT: tl.constexpr, ROWS: tl.constexpr):
    """The lowest key that min-p keeps: x / T >= peak + log(floor), which holds of the peak itself
    at a floor of 1."""
    inv_t = 1.0 / scale
    least = peak
    if some(floor > 0.0, ROWS) > 0:
        least = peak + tl.log(tl.where(floor > 0.0, floor, 1.0))
    low = (floor * 0.0).to(tl.int64) + (LOWEST >> SHIFT)
    high = low - (LOWEST >> SHIFT) + (HIGHEST >> SHIFT)
    for _ in range(33 * some(floor > 0.0, ROWS)):
        middle = (low + high) >> 1
        enough = smallest_with(middle, SHIFT) * inv_t >= least
        low = tl.where(enough, low, middle)
        high = tl.where(enough, middle, high)
    return tl.where(floor > 0.0, high, (LOWEST >> SHIFT))


@triton.jit
def pivots_of(search, turn, peak, scale, floor_key, SHIFT: tl.constexpr, PIVOTS: tl.constexpr):
    """The keys that a round counts against, [R, P]. In the first: the lowest, for the totals; that
    of min-p; others at growing distances below the peak. Later ones divide the bracket evenly, by
    turns in value, which is quick, and in keys, which ends: half of all keys lie between -1 and 1.
    """
    _, _, low, high, _, _, _, _, _ = search
    top = peak * scale
    j = tl.arange(0, PIVOTS)[None, :]
    steps = tl.where(j == 1, PIVOTS - 1, j - 1)
    distant = top - 0.35 * scale * (steps * steps)
    share = (j + 1) / (PIVOTS + 1.0)
    least = tl.maximum(smallest_with(low, SHIFT), top - 9.0 * PIVOTS * scale)
    most = tl.minimum(smallest_with(high, SHIFT), top)
    value = tl.where(turn == 0, distant, least + (most - least) * share)
    pivots = low + (high - low) * (j + 1) // (PIVOTS + 1)
    by_value = (turn == 0) | (turn % 2 == 1)
    pivots = tl.where(by_value, (key_of(value) >> SHIFT).to(tl.int64), pivots)
    pivots = tl.maximum(tl.minimum(pivots, high - 1), low + 1)
    at_floor = (turn == 0) & (j == 1) & (floor_key > (LOWEST >> SHIFT))
    pivots = tl.where(at_floor, floor_key, pivots)
    return tl.where((turn == 0) & (j == 0), (LOWEST >> SHIFT), pivots)


@triton.jit
def narrowed(
    search, turn, counted, pivots, counts, masses, p, SHIFT: tl.constexpr, ROWS: tl.constexpr
):
    """The search after the counts [R, P] and masses at or above the pivots of a round, in the rows
    that `counted`. A phase ends when the bracket holds one key or one logit, or when just k logits
    are above it."""
    phase, goal, low, high, count, above, mass, mass_above, collected = search
    if turn == 0:
        mass = tl.where(counted, row_max(masses, ROWS), mass)
        goal = tl.where(phase == 1, (p * mass.to(tl.float64)).to(tl.int64), goal)
    active = counted & (phase < 2)
    measured = tl.where(phase == 1, masses, counts)
    enough = active & (measured >= goal) & (measured > 0)
    lacking = active & ~enough
    low = row_max(tl.where(enough, pivots, low), ROWS)
    here = enough & (pivots == low)
    moved = row_max(here.to(tl.int32), ROWS) > 0
    count = tl.where(moved, row_max(tl.where(here, counts, 0), ROWS), count)
    mass = tl.where(moved, row_max(tl.where(here, masses, 0), ROWS), mass)
    high = row_min(tl.where(lacking, pivots, high), ROWS)
    here = lacking & (pivots == high)
    moved = row_max(here.to(tl.int32), ROWS) > 0
    above = tl.where(moved, row_max(tl.where(here, counts, 0), ROWS), above)
    mass_above = tl.where(moved, row_max(tl.where(here, masses, 0), ROWS), mass_above)

    ended = (high - low <= 1) | (count - above <= 1) | ((phase == 0) & (count == goal))
    ended = ended & active
    onward = ended & (phase == 0) & (p < 1.0) & (count > 1)
    phase = tl.where(ended, tl.where(onward, 1, 2), phase)
    goal = tl.where(onward, (p * mass.to(tl.float64)).to(tl.int64), goal)
    high = tl.where(onward, (HIGHEST >> SHIFT), high)
    above = tl.where(onward, 0, above)
    mass_above = tl.where(onward, 0, mass_above)
    return phase, goal, low, high, count, above, mass, mass_above, collected


@triton.jit
def begun(k, p, width, SHIFT: tl.constexpr):
    """The search of a row before the first round."""
    zero = k.to(tl.int64) * 0
    phase = zero + tl.where((k > 0) & (k < width), 0, tl.where(p < 1.0, 1, 2))
    low = zero + (LOWEST >> SHIFT)
    return phase, zero + k, low, zero + (HIGHEST >> SHIFT), zero + width, zero, zero, zero, zero


@triton.jit
def load_search(at, mask):
    return (
        tl.load(at, mask=mask, other=2),
        tl.load(at + 1, mask=mask, other=0),
        tl.load(at + 2, mask=mask, other=0),
        tl.load(at + 3, mask=mask, other=0),
        tl.load(at + 4, mask=mask, other=0),
        tl.load(at + 5, mask=mask, other=0),
        tl.load(at + 6, mask=mask, other=0),
        tl.load(at + 7, mask=mask, other=0),
        tl.load(at + 8, mask=mask, other=0),
    )


@triton.jit
def after_round(
    words,
    turn,
    wanted,
    peak,
    scale,
    p,
    floor_key,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The search after a round whose tallies are complete."""
    search = load_search(words + turn * 16, wanted)
    phase, _, _, _, _, _, _, _, collected = search
    counted = wanted & ((turn == 0) | ((phase < 2) & (collected == 0)))
    pivots = pivots_of(search, turn, peak, scale, floor_key, SHIFT, PIVOTS)
    at = words + TALLIES + turn * 16 + tl.arange(0, PIVOTS)[None, :]
    counts = tl.load(at, mask=counted & (pivots == pivots), other=0)
    masses = tl.load(at + 8, mask=counted & (pivots == pivots), other=0)
    return narrowed(search, turn, counted, pivots, counts, masses, p, SHIFT, ROWS)


@triton.jit
def store_search(at, search, collected, mask):
    phase, goal, low, high, count, above, mass, mass_above, _ = search
    tl.store(at, phase, mask=mask)
    tl.store(at + 1, goal, mask=mask)
    tl.store(at + 2, low, mask=mask)
    tl.store(at + 3, high, mask=mask)
    tl.store(at + 4, count, mask=mask)
    tl.store(at + 5, above, mask=mask)
    tl.store(at + 6, mass, mask=mask)
    tl.store(at + 7, mass_above, mask=mask)
    tl.store(at + 8, collected, mask=mask)
