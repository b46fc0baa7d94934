"""The rows of `reference.py` in Triton: one program takes a few rows and goes over the vocabulary
two or three times, computing in float32 whatever the logits' dtype.

First the softmax statistics of both sides, in one online pass; then, for the losses that need them,
sums over the vocabulary; last the gradient, written over the draft's logits. Sums are kept lane by
lane and reduced once at the end. With L = Σ f(p, q) the gradient with respect to logit k is
q_k (f'_k − Σ q f') / T, f' = ∂f/∂q; the formulas below are that, simplified.

Row lengths come in units of UNIT numbers: with UNIT = 16 the compiler knows that all rows start and
end on 16 of them, and reads 16 bytes at a time. ROWS is 1 on a GPU; the interpreter, which pays by
the operation, takes more.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.0e38)  # where a running maximum starts: from -inf, -inf - -inf is NaN


@triton.jit
def _logsumexp(top, total, inv_t):
    """Of each row of x / T, from lane-wise maxima of x [R, BLOCK] and the sums of exp(x / T)
    scaled by them.
    """
    most = tl.max(top, 1)
    total = tl.sum(total * tl.exp((top - most[:, None]) * inv_t), 1)
    log_total = tl.log(tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, -INF, most * inv_t + log_total)


@triton.jit(do_not_specialize=["num_rows", "width_units", "stride_units"])
def logsumexp_kernel(
    logits,
    out,
    num_rows,
    width_units,
    stride_units,
    inv_t,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    width = width_units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    row = tl.minimum(row, num_rows - 1)
    base = logits + row.to(tl.int64)[:, None] * (stride_units * UNIT)
    top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(base + c, mask=c < width, other=-INF).to(tl.float32)
        e = tl.exp(-tl.abs(x - top) * inv_t)
        total = tl.where(x > top, total * e + 1.0, total + e)
        top = tl.maximum(top, x)
    tl.store(out + row, _logsumexp(top, total, inv_t), mask=inside)


@triton.jit
def _less(ratio, of_tail, centred, y):
    """log q/p or log q/m [R, BLOCK] less what it is for each token of the tail (y = INF), where
    that is a number: then 0 for these, without rounding. Nearly all of q may lie there, and means
    of the ratios would cancel against them.
    """
    return tl.where(centred & (y == INF), 0.0, ratio - of_tail[:, None])


@triton.jit(do_not_specialize=["num_rows", "width_units", "stride_units"])
def divergence_kernel(
    draft,  # [num_rows, width] contiguous raw logits, overwritten by the gradient
    target,  # Dense: raw logits; LUMPED: log p of the k tokens, +inf for a token of the tail
    whole,  # [num_rows] Dense: logsumexp over the target's whole vocabulary, -inf if this is it;
    #         LUMPED: log mass of the tail
    missing,  # [num_rows] LUMPED: the mass of tokens among the k that the draft lacks
    labels,  # [num_rows] CE: column of the label, -1 if the draft lacks it
    weights,  # [num_rows]
    losses,  # [num_rows] out
    num_rows,
    width_units,
    stride_units,  # from row to row of target
    inv_t,
    squared_t,
    w_fkl,
    w_rkl,
    w_jsd,
    w_tvd,
    w_alpha,
    w_hybrid,
    w_ce,
    beta,
    eta,
    LUMPED: tl.constexpr,
    SUMS: tl.constexpr,  # a loss other than fkl and ce takes part
    CE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    row = tl.minimum(row, num_rows - 1)  # rows past the end repeat the last and store nothing
    width = width_units * UNIT
    x_row = draft + row.to(tl.int64)[:, None] * width
    y_row = target + row.to(tl.int64)[:, None] * (stride_units * UNIT)

    # Statistics, lane by lane: a running maximum and the sum scaled by it, one exp a number.
    q_top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)
    q_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    one_sum = tl.zeros((ROWS, BLOCK), tl.float32)  # of q at temperature 1, same maximum
    p_top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)  # LUMPED: of q over the tail
    p_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_row + c, mask=c < width, other=-INF).to(tl.float32)
        y = tl.load(y_row + c, mask=c < width, other=-INF).to(tl.float32)
        if CE:
            e = tl.exp(-tl.abs(x - q_top))
            one_sum = tl.where(x > q_top, one_sum * e + 1.0, one_sum + e)
        e = tl.exp(-tl.abs(x - q_top) * inv_t)
        q_sum = tl.where(x > q_top, q_sum * e + 1.0, q_sum + e)
        q_top = tl.maximum(q_top, x)
        if LUMPED:
            y = tl.where(y == INF, x, -INF)
        e = tl.exp(-tl.abs(y - p_top) * inv_t)
        p_sum = tl.where(y > p_top, p_sum * e + 1.0, p_sum + e)
        p_top = tl.maximum(p_top, y)

    q_norm = _logsumexp(q_top, q_sum, inv_t)
    own = _logsumexp(p_top, p_sum, inv_t)
    outer = tl.load(whole + row)
    if LUMPED:  # p shares the tail among its tokens as q does: the same as one lumped outcome
        no_tail = own == -INF
        kept = 1.0 - tl.load(missing + row) - tl.where(no_tail, tl.exp(outer), 0.0)
        kept = tl.maximum(kept, 0.0)
        p_norm = tl.where(no_tail, 0.0, own - outer)
    else:
        p_norm = tl.maximum(own, outer)
        kept = tl.exp(own - p_norm)
    q_norm = q_norm[:, None]
    p_norm = p_norm[:, None]

    total = tl.zeros((ROWS,), tl.float32)
    r_tail = tl.zeros((ROWS,), tl.float32)  # log q/p of each token of the tail, if that is a number
    j_tail = tl.zeros((ROWS,), tl.float32)  # log q/m
    centred = tl.zeros((ROWS, 1), tl.int1)
    if LUMPED and SUMS:
        of_tail = p_norm - q_norm
        mixed = -tl.log(beta * tl.exp(-of_tail) + (1.0 - beta))
        centred = (no_tail == 0)[:, None] & (tl.abs(of_tail) < INF) & (tl.abs(mixed) < INF)
        r_tail += tl.sum(tl.where(centred, of_tail, 0.0), 1)
        j_tail += tl.sum(tl.where(centred, mixed, 0.0), 1)
    c_kl = tl.zeros((ROWS,), tl.float32) + w_fkl
    c_tv = tl.zeros((ROWS,), tl.float32) + w_tvd
    if SUMS:
        q_over_p = tl.zeros((ROWS, BLOCK), tl.float32)  # Σ q log(q/p)
        q_over_m = tl.zeros((ROWS, BLOCK), tl.float32)
        p_over_m = tl.zeros((ROWS, BLOCK), tl.float32)
        excess = tl.zeros((ROWS, BLOCK), tl.float32)  # Σ max(0, p − q)
        low_top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)
        low_sum = tl.zeros((ROWS, BLOCK), tl.float32)  # Σ min(p, q), scaled by low_top's exp
        low_q = tl.zeros((ROWS, BLOCK), tl.float32)  # the part of it where q is the smaller
        high_q = tl.zeros((ROWS, BLOCK), tl.float32)  # Σ q where it is the larger
        for start in range(0, width, BLOCK):
            c = start + tl.arange(0, BLOCK)[None, :]
            x = tl.load(x_row + c, mask=c < width, other=-INF).to(tl.float32) * inv_t
            y = tl.load(y_row + c, mask=c < width, other=-INF).to(tl.float32)
            log_q = x - q_norm
            log_p = tl.where(y == INF, x - p_norm, y) if LUMPED else y * inv_t - p_norm
            p = tl.exp(log_p)
            q = tl.exp(log_q)
            m = beta * p + (1.0 - beta) * q
            log_m = tl.log(tl.where(m > 0.0, m, 1.0))
            r = _less(log_q - log_p, r_tail, centred, y)
            j = _less(log_q - log_m, j_tail, centred, y)
            q_over_p += tl.where((q > 0.0) & (w_rkl > 0.0), q * r, 0.0)
            q_over_m += tl.where(q > 0.0, q * j, 0.0)
            p_over_m += tl.where(p > 0.0, p * (log_p - log_m), 0.0)
            low = tl.minimum(log_p, log_q)
            share = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
            e = tl.exp(-tl.abs(low - low_top))
            low_sum = tl.where(low > low_top, low_sum * e + 1.0, low_sum + e)
            low_q = tl.where(low > low_top, low_q * e + share, low_q + share * e)
            low_top = tl.maximum(low_top, low)
            high_q += q * (1.0 - share)
            excess += p - tl.minimum(p, q)
        r_mean = tl.sum(q_over_p, 1)
        j_mean = tl.sum(q_over_m, 1)
        of_p = tl.sum(p_over_m, 1) - (1.0 - kept) * tl.log(tl.zeros((ROWS,), tl.float32) + beta)
        total += w_rkl * (r_tail + r_mean) + w_jsd * (
            beta * of_p + (1.0 - beta) * (j_tail + j_mean)
        )
        most = tl.max(low_top, 1)
        scale = tl.exp(low_top - most[:, None])
        overlap = tl.sum(low_sum * scale, 1)  # α e^-most
        apart = overlap == 0.0
        q_share = tl.sum(low_q * scale, 1) / tl.where(apart, 1.0, overlap)
        log_alpha = most + tl.log(tl.where(apart, 1.0, overlap))
        alpha = tl.where(apart, 0.0, tl.exp(log_alpha))
        higher = tl.sum(high_q, 1)
        mix = tl.exp(-eta * alpha)
        c_kl += w_hybrid * squared_t * mix
        c_tv += w_hybrid * (1.0 - mix)
        total += c_tv * (tl.sum(excess, 1) + 1.0 - kept)
        total += tl.where(w_alpha > 0.0, -w_alpha * tl.where(apart, -INF, log_alpha), 0.0)

    weight = tl.load(weights + row)
    if CE:
        one_norm = _logsumexp(q_top, one_sum, 1.0)
        label = tl.load(labels + row)
        known = label >= 0
        at = row.to(tl.int64) * width + tl.where(known, label, 0)
        picked = tl.load(draft + at).to(tl.float32)
        tl.debug_barrier()  # every thread has it before one writes a gradient there
        c_ce = tl.where(known, w_ce, 0.0)
        total += tl.where(known, w_ce * (one_norm - picked), 0.0)

    p_over_q = tl.zeros((ROWS, BLOCK), tl.float32)  # Σ p log(p/q)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        raw = tl.load(x_row + c, mask=c < width, other=-INF).to(tl.float32)
        y = tl.load(y_row + c, mask=c < width, other=-INF).to(tl.float32)
        x = raw * inv_t
        log_q = x - q_norm
        log_p = tl.where(y == INF, x - p_norm, y) if LUMPED else y * inv_t - p_norm
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        p_over_q += tl.where((p > 0.0) & (c_kl > 0.0)[:, None], p * (log_p - log_q), 0.0)
        gradient = c_kl[:, None] * (kept[:, None] * q - p)
        if SUMS:
            m = beta * p + (1.0 - beta) * q
            log_m = tl.log(tl.where(m > 0.0, m, 1.0))
            r = _less(log_q - log_p, r_tail, centred, y)
            r = tl.where(w_rkl > 0.0, r - r_mean[:, None], 0.0)
            j = _less(log_q - log_m, j_tail, centred, y) - j_mean[:, None]
            gradient += tl.where(q > 0.0, q * (w_rkl * r + w_jsd * (1.0 - beta) * j), 0.0)
            share = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
            # Σ share q less 1 is -Σ (1 - share) q, which does not cancel where it is small.
            gradient += c_tv[:, None] * q * ((alpha * q_share)[:, None] * (1.0 - share))
            gradient -= c_tv[:, None] * q * (higher[:, None] * share)
            # In logs, as α may be too small for a float; q e^-log α is at most 1 where q ≤ p.
            lower = tl.where(share > 0.0, share * tl.exp(log_q - log_alpha[:, None]), 0.0)
            gradient += w_alpha * (q * q_share[:, None] * (1.0 - share) - lower * higher[:, None])
        gradient *= inv_t
        if CE:
            hit = tl.where(c == label[:, None], 1.0, 0.0)
            gradient += c_ce[:, None] * (tl.exp(raw - one_norm[:, None]) - hit)
        gradient *= weight[:, None]
        tl.store(x_row + c, gradient, mask=(c < width) & inside[:, None])

    log_kept = tl.log(tl.where(kept > 0.0, kept, 1.0))
    fkl = tl.sum(p_over_q, 1) - kept * log_kept
    total += tl.where(c_kl > 0.0, c_kl * fkl, 0.0)
    tl.store(losses + row, total * weight, mask=inside)
