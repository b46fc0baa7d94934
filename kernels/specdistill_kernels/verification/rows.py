"""Row statistics in Triton: what a softmax needs, without writing a row down.

A row of logits becomes its peak and its mass, the maximum of logits / T and the sum of
exp(logits / T - peak), as partial results over parts of the vocabulary; and, after filters, its
cut, the smallest raw logit that is kept. `statistics`, `warped` and `probability` give p back
wherever it is needed. A row without a distribution has mass 0, and nothing is loaded of it then.

What is done for every token of the vocabulary decides the time, more than its bytes: a logit is
multiplied by 1 / T and not divided, `exp` flushes numbers below 1e-38 to 0, and 1 / E is the square
of a reciprocal root: one instruction in place of four, and three in place of eleven.

Rows are numbered: target row (b, g) is b * (G+1) + g, draft row (b, g) is B * (G+1) + b * G + g.
A number that belongs to a row or a request is kept in a column: [R, 1] where a program has several
of them, as the interpreter's have, and a scalar where it has one, as on a GPU (for a [1, 1] tensor
the compiler would find a layout and have every thread load it many times). A side is a tuple
(logits, stride of b, stride of g, width); `rows` is (peaks, masses, cuts, splits).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from triton.language.extra import libdevice

from specdistill_kernels import tiles

INTERPRETED = tl.constexpr(tiles.INTERPRETED)  # by what knows nothing of libdevice
INF = tl.constexpr(float("inf"))
NOWHERE = tl.constexpr(0x7FFFFFFF)  # an index no token has
WORDS = tl.constexpr(256)  # of a row in the workspace of the filters
INTS = [  # not to be compiled for their values
    *("batch", "num", "width_units", "draft_width_units", "splits", "position", "turn", "room"),
    *("target_b", "target_g", "draft_b", "draft_g", "has_q", "has_lse", "has_certain"),
    *("has_tokens", "has_k", "has_p", "has_min", "trimmed", "filtered", "block_mode"),
]


@triton.jit
def exp(x):
    return tl.exp(x) if INTERPRETED else libdevice.fast_expf(x)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x) if INTERPRETED else libdevice.rsqrt(x)


@triton.jit
def numbers(ROWS: tl.constexpr):
    """The rows of this program, a column."""
    if ROWS == 1:
        return tl.program_id(0)
    else:
        return tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def single(x, ROWS: tl.constexpr):
    """A [R, 1] tensor as a column."""
    if ROWS == 1:
        x = tl.max(x)
    return x


@triton.jit
def row_max(x, ROWS: tl.constexpr):
    return tl.max(x) if ROWS == 1 else tl.max(x, 1, keep_dims=True)


@triton.jit
def row_min(x, ROWS: tl.constexpr):
    return tl.min(x) if ROWS == 1 else tl.min(x, 1, keep_dims=True)


@triton.jit
def row_sum(x, ROWS: tl.constexpr):
    return tl.sum(x) if ROWS == 1 else tl.sum(x, 1, keep_dims=True)


@triton.jit
def some(flags, ROWS: tl.constexpr):
    """1 if a flag of a column is set."""
    flags = flags.to(tl.int32)
    return flags if ROWS == 1 else tl.max(flags)


@triton.jit
def most(values, ROWS: tl.constexpr):
    """The largest number of a column."""
    return values if ROWS == 1 else tl.max(values)


@triton.jit
def offered(tokens, lengths, has_tokens, b, ok, num, GP: tl.constexpr, ROWS: tl.constexpr):
    """How many proposals of request b count: up to its length and its first -1. All rows do where
    there are none, in `sample`."""
    every = tl.where(ok & (has_tokens == 0), num, 0)
    ok = ok & (has_tokens != 0)
    end = tl.minimum(tl.load(lengths + b, mask=ok, other=0), num).to(tl.int32)
    end = tl.maximum(end, every)
    for start in range(0, num, GP):
        g = (start + tl.arange(0, GP))[None, :]
        token = tl.load(tokens + b * num + g, mask=ok & (g < num), other=0)
        end = tl.minimum(end, row_min(tl.where(token < 0, g, num), ROWS))
    return end


@triton.jit
def warped(pointers, mask, inv_t, cut, filtered):
    """Logits after temperature and filters, float32."""
    raw = tl.load(pointers, mask=mask, other=-INF).to(tl.float32)
    x = raw * inv_t
    if filtered != 0:
        x = tl.where(raw < cut, -INF, x)
    return x


@triton.jit
def probability(x, peak, mass):
    """p of warped logits; 0 where they were not loaded."""
    return exp(x - peak) * (1.0 / tl.where(mass > 0.0, mass, 1.0))


@triton.jit
def statistics(rows, row, need, has_cut, SP: tl.constexpr):
    """Peak, mass and cut of rows [R, K]; peak and mass are 0 where a row has no distribution."""
    peaks, masses, cuts, splits = rows
    k = tl.arange(0, SP)[None, None, :]
    mask = need[:, :, None] & (k < splits)
    at = row[:, :, None] * SP + k
    parts = tl.load(peaks + at, mask=mask, other=-INF)
    mass = tl.load(masses + at, mask=mask, other=0.0)
    peak = tl.max(parts, 2)
    finite = tl.abs(peak) < INF
    peak = tl.where(finite, peak, 0.0)
    mass = tl.where(finite[:, :, None], mass * tl.exp(parts - peak[:, :, None]), 0.0)
    cut = tl.load(cuts + row, mask=need & (has_cut != 0), other=-INF)
    return peak, tl.sum(mass, 2), cut


@triton.jit
def row_statistics(rows, row, need, has_cut, SP: tl.constexpr, ROWS: tl.constexpr):
    """As `statistics`, for a column of rows."""
    row = row + tl.zeros((ROWS, 1), tl.int64)
    need = need & (row >= 0)
    peak, mass, cut = statistics(rows, row, need, has_cut, SP)
    return single(peak, ROWS), single(mass, ROWS), single(cut, ROWS)


@triton.jit
def first_maximum(peaks, firsts, row, need, splits, SP: tl.constexpr):
    """The first maximum of greedy rows [R, K]; -1 where the row has no finite one."""
    k = tl.arange(0, SP)[None, None, :]
    mask = need[:, :, None] & (k < splits)
    at = row[:, :, None] * SP + k
    parts = tl.load(peaks + at, mask=mask, other=-INF)
    first = tl.load(firsts + at, mask=mask, other=NOWHERE)
    peak = tl.max(parts, 2)
    first = tl.min(tl.where(parts == peak[:, :, None], first, NOWHERE), 2)
    return tl.where(tl.abs(peak) < INF, first, -1)


@triton.jit
def row_first_maximum(peaks, firsts, row, need, splits, SP: tl.constexpr, ROWS: tl.constexpr):
    """As `first_maximum`, for a column of rows."""
    row = row + tl.zeros((ROWS, 1), tl.int64)
    return single(first_maximum(peaks, firsts, row, need & (row >= 0), splits, SP), ROWS)


@triton.jit
def row_of_program(p_side, q_side, batch, num, ROWS: tl.constexpr):
    """The rows a program stands for, target rows first: where they begin, how wide they are, their
    numbers, requests b and positions g, and whether they belong to the draft."""
    target, target_b, target_g, width = p_side
    draft, draft_b, draft_g, draft_width = q_side
    blocks = tl.cdiv(batch * (num + 1), ROWS)
    is_draft = tl.program_id(0) >= blocks
    row = numbers(ROWS)
    if is_draft:
        row = row - blocks * ROWS
        b = (row // num).to(tl.int64)
        g = row % num
        base = draft + b * draft_b + g * draft_g
        row = row + batch * (num + 1)
        width = draft_width
    else:
        b = (row // (num + 1)).to(tl.int64)
        g = row % (num + 1)
        base = target + b * target_b + g * target_g
    return base, width, row.to(tl.int64), b, g, is_draft


@triton.jit(do_not_specialize=INTS)
def stats_kernel(
    target,
    draft,
    tokens,
    lengths,
    temperature,
    certain,
    peaks,
    masses,
    firsts,
    arrived,
    search,
    batch,
    num,
    width_units,
    draft_width_units,
    target_b,
    target_g,
    draft_b,
    draft_g,
    has_tokens,
    has_certain,
    filtered,
    UNIT: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Peak and mass of every row that will be asked for, over one part of the vocabulary, and in
    greedy rows the first maximum. Grid: blocks of rows, parts.

    The row after the last proposal of a sampled request is left out unless it must be filtered:
    drawing from it needs no normaliser. Nor does `sample` need any of a greedy row. What later
    launches count with is set to 0.
    """
    p_side = (target, target_b * UNIT, target_g * UNIT, width_units * UNIT)
    q_side = (draft, draft_b * UNIT, draft_g * UNIT, draft_width_units * UNIT)
    base, width, row, b, g, is_draft = row_of_program(p_side, q_side, batch, num, ROWS)
    part = tl.program_id(1)
    ok = b < batch
    t = tl.load(temperature + b, mask=ok, other=0.0)
    greedy = t == 0.0
    inv_t = 1.0 / tl.where(greedy, 1.0, t)
    end = offered(tokens, lengths, has_tokens, b, ok, num, GP, ROWS)
    if is_draft:
        sure = tl.load(certain + b, mask=ok & (has_certain != 0), other=0) != 0
        need = ok & (g < end) & ~greedy & ~sure
    else:
        need = ok & ((g < end) | ((g == end) & (greedy | (filtered != 0))))
        need = need & ((has_tokens != 0) | ~greedy)
        tl.store(arrived + b, 0, mask=ok & (g == 0) & (part == 0))
    if filtered != 0:
        words = tl.arange(0, WORDS)[None, :]
        tl.store(search + row * WORDS + words, 0, mask=ok & (part == 0) & (words >= 0))

    c = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
    raw = tl.load(base + c, mask=need & (c < width), other=-INF).to(tl.float32)
    peak = row_max(raw, ROWS) * inv_t
    mass = row_sum(exp(raw * inv_t - tl.where(tl.abs(peak) < INF, peak, 0.0)), ROWS)
    peak = tl.where(mass == mass, peak, INF)  # a NaN spoils its row, as +inf does
    at = row * SP + part
    tl.store(peaks + at, peak, mask=need)
    tl.store(masses + at, mass, mask=need)
    if some(need & greedy, ROWS) > 0:
        first = row_min(tl.where(raw == peak, c, NOWHERE), ROWS)
        tl.store(firsts + at, first, mask=need & greedy)
