"""Top-k, top-p and min-p in Triton: each row's cut, found in passes over the raw logits that many
programs share.

No probability is written and nothing is sorted. The rule is that of `probabilities`: temperature,
top-k, renormalise, top-p, min-p, renormalise; what ties with a threshold is kept.

Top-k and top-p each keep all logits from a threshold on: the largest at or above which there are k
logits, then the largest at or above which there is p of their mass. A bracket [low, high) of
order-preserving integer keys holds it, of 16 bits for bfloat16. A fixed number of launches of
`tally_kernel` narrow it by PIVOTS keys each, or, once it holds few logits, collect these;
`cut_kernel` searches what was collected. Only where that never came to pass, since more logits than
have room lie within a few keys, it goes on over the whole row: slower, with the same result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from specdistill_kernels.verification.rows import (
    INF,
    INTS,
    WORDS,
    exp,
    most,
    offered,
    row_of_program,
    row_statistics,
    row_sum,
    some,
)
from specdistill_kernels.verification.search import (
    FILLED,
    TALLIES,
    UNITS,
    after_round,
    begun,
    floor_key_of,
    narrowed,
    pivots_of,
    smallest_with,
    store_search,
)


@triton.jit
def _asked(
    options, settings, b, g, is_draft, width, batch, num, GP: tl.constexpr, ROWS: tl.constexpr
):
    """Which rows are drawn from at a temperature above 0, which of them a filter touches, and their
    temperature, k, p and floor."""
    tokens, lengths, temperature, certain, has_tokens, has_certain = options
    top_k, top_p, min_p, has_k, has_p, has_min = settings
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    warm = ok & (t > 0.0)
    sure = tl.load(certain + b, mask=ok & is_draft & (has_certain != 0), other=0) != 0
    end = offered(tokens, lengths, has_tokens, b, ok, num, GP, ROWS)
    need = warm & ~sure & ((g < end) | ((g == end) & (is_draft == 0)))
    k = tl.load(top_k + b, mask=need & (has_k != 0), other=0).to(tl.int32)
    p = tl.load(top_p + b, mask=need & (has_p != 0), other=1.0)
    floor = tl.load(min_p + b, mask=need & (has_min != 0), other=0.0)
    wanted = need & (((k > 0) & (k < width)) | (p < 1.0) | (floor > 0.0))
    return need, wanted, tl.where(warm, t, 1.0), k, p, floor


@triton.jit
def _tally(x, pivots, w):
    """How many logits [R, N] lie at or above each pivot [R, P], and their mass; w is theirs."""
    above = x[:, None, :] >= pivots[:, :, None]
    return tl.sum(above.to(tl.int32), 2), tl.sum(tl.where(above, w[:, None, :], 0), 2)


@triton.jit
def _append(to, filled, x, chosen, collects, ROWS: tl.constexpr):
    """The chosen of x [R, N] to each row's candidates, in any order."""
    many = row_sum(chosen.to(tl.int32), ROWS)
    if some(many, ROWS) > 0:
        begin = tl.atomic_add(filled, many.to(tl.int64), mask=collects, sem="relaxed")
        tl.store(to + begin + tl.cumsum(chosen.to(tl.int32), 1) - 1, x, mask=chosen)


@triton.jit(do_not_specialize=INTS)
def tally_kernel(
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
    search,
    candidates,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    splits,
    has_tokens,
    has_certain,
    has_k,
    has_p,
    has_min,
    turn,
    room,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One round over each row that a filter touches: count against the pivots, or collect what the
    bracket holds (in the phase of top-k all from low on, among which top-p then searches). Grid:
    blocks of rows, programs that share their tiles; how many has no influence on the result."""
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    base, width, row, b, g, is_draft = row_of_program(p_side, q_side, batch, num, ROWS)
    options = (tokens, lengths, temperature, certain, has_tokens, has_certain)
    settings = (top_k, top_p, min_p, has_k, has_p, has_min)
    _need, wanted, scale, k, p, floor = _asked(
        options, settings, b, g, is_draft, width, batch, num, GP, ROWS
    )
    if some(wanted, ROWS) > 0:
        peak, mass, _cut = row_statistics((peaks, masses, cuts, splits), row, wanted, 0, SP, ROWS)
        wanted = wanted & (mass > 0.0)
        inv_t = 1.0 / scale
        floor_key = floor_key_of(floor, peak, scale, SHIFT, ROWS)
        words = search + row * WORDS
        now = begun(k, p, width, SHIFT)
        if turn > 0:
            now = after_round(
                words, turn - 1, wanted, peak, scale, p, floor_key, SHIFT, PIVOTS, ROWS
            )
        phase, _goal, low, high, count, above, mass, _mass_above, collected = now
        active = wanted & ((turn == 0) | ((phase < 2) & (collected == 0)))
        inside = count - tl.where(phase == 1, above, 0)
        collects = active & (turn > 0) & (inside <= room)
        counts = active & ~collects

        part = tl.program_id(1)
        at = words + turn * 16
        first = wanted & (part == 0)
        store_search(at, now, tl.where(collects, 1, collected), first)

        if some(active, ROWS) > 0:
            pivots = pivots_of(now, turn, peak, scale, floor_key, SHIFT, PIVOTS)
            numbers = tl.zeros((ROWS, PIVOTS), tl.int64)
            sums = tl.zeros((ROWS, PIVOTS), tl.int64)
            stride = tl.num_programs(1) * BLOCK
            c = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
            ahead = tl.load(base + c, mask=active & (c < width), other=-INF)
            for _ in range(part * BLOCK, width, stride):
                x = ahead.to(tl.float32)
                here = c < width
                c += stride  # the next tile is on its way while this one is counted
                ahead = tl.load(base + c, mask=active & (c < width), other=-INF)
                if some(counts, ROWS) > 0:
                    w = exp(x * inv_t - peak)
                    more, heavier = _tally(x, smallest_with(pivots, SHIFT), w)
                    numbers += more
                    sums += (heavier * UNITS).to(tl.int64)
                if some(collects, ROWS) > 0:
                    chosen = collects & here & (x >= smallest_with(low, SHIFT))
                    chosen = chosen & ((phase == 0) | (x < smallest_with(high, SHIFT)))
                    _append(candidates + row * room, words + FILLED, x, chosen, collects, ROWS)
            tallies = words + TALLIES + turn * 16 + tl.arange(0, PIVOTS)[None, :]
            mask = counts & (pivots == pivots)
            tl.atomic_add(tallies, numbers, mask=mask, sem="relaxed")
            tl.atomic_add(tallies + 8, sums, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=INTS)
def cut_kernel(
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
    search,
    candidates,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    splits,
    has_tokens,
    has_certain,
    has_k,
    has_p,
    has_min,
    turn,
    room,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The cut of each row that is drawn from at a temperature above 0, with its mass replaced by
    that of what the cut keeps, and the logsumexp it had before; turn is that of the last round.
    Grid: blocks of rows."""
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    base, width, row, b, g, is_draft = row_of_program(p_side, q_side, batch, num, ROWS)
    options = (tokens, lengths, temperature, certain, has_tokens, has_certain)
    settings = (top_k, top_p, min_p, has_k, has_p, has_min)
    need, wanted, scale, _k, p, floor = _asked(
        options, settings, b, g, is_draft, width, batch, num, GP, ROWS
    )
    if some(need, ROWS) > 0:
        peak, whole, _cut = row_statistics((peaks, masses, cuts, splits), row, need, 0, SP, ROWS)
        good = whole > 0.0
        lse = peak + tl.log(tl.where(good, whole, 1.0))
        wanted = wanted & good
        inv_t = 1.0 / scale
        floor_key = floor_key_of(floor, peak, scale, SHIFT, ROWS)
        words = search + row * WORDS
        now = after_round(words, turn, wanted, peak, scale, p, floor_key, SHIFT, PIVOTS, ROWS)
        phase, goal, low, high, count, above, mass, mass_above, collected = now
        few = collected != 0
        tokens_there = tl.where(few, tl.load(words + FILLED, mask=wanted & few, other=0), width)
        beyond = tl.where(few & (phase == 1), above, 0)
        mass_beyond = tl.where(few & (phase == 1), mass_above, 0)
        active = wanted & (phase < 2)
        turn = 2 * turn + 1  # in value first
        while some(active, ROWS) > 0:
            now = (phase, goal, low, high, count, above, mass, mass_above, collected)
            pivots = pivots_of(now, turn, peak, scale, floor_key, SHIFT, PIVOTS)
            least = smallest_with(pivots, SHIFT)
            numbers = tl.zeros((ROWS, PIVOTS), tl.int64)
            sums = tl.zeros((ROWS, PIVOTS), tl.int64)
            stop = most(tl.where(active, tokens_there, 0), ROWS)
            for start in range(0, stop, BLOCK):
                c = start + tl.arange(0, BLOCK)[None, :]
                there = active & (c < tokens_there)
                x = tl.load(base + c, mask=there & ~few, other=-INF).to(tl.float32)
                y = tl.load(candidates + row * room + c, mask=there & few, other=-INF)
                x = tl.where(few, y, x)
                w = (exp(x * inv_t - peak) * UNITS).to(tl.int64)
                more, heavier = _tally(x, least, w)
                numbers += more
                sums += heavier
            phase, goal, low, high, count, above, mass, mass_above, collected = narrowed(
                now, turn, active, pivots, numbers + beyond, sums + mass_beyond, p, SHIFT, ROWS
            )
            active = active & (phase < 2)
            turn += 1

        floored = wanted & (floor_key > low)
        at_floor = tl.load(words + TALLIES + 9, mask=floored, other=0)
        left = tl.where(floored, at_floor, mass).to(tl.float32) * (1.0 / UNITS)
        left = tl.where(wanted, left, whole)
        cut = smallest_with(tl.where(floored, floor_key, low), SHIFT)
        tl.debug_barrier()  # no thread may still be reading the parts that are replaced here
        part = tl.arange(0, SP)[None, :]
        store = need & (part < splits)
        tl.store(peaks + row * SP + part, tl.where(part == 0, peak, -INF), mask=store)
        tl.store(masses + row * SP + part, tl.where(part == 0, left, 0.0), mask=store)
        tl.store(cuts + row, tl.where(wanted, cut, -INF), mask=need)
        tl.store(logsumexps + row, tl.where(good, lse, float("nan")), mask=need)
