"""Distillation losses from hidden states: head, divergence and gradients by chunks of rows, so that
memory grows with the chunk and not with the number of tokens. The losses themselves are defined in
`reference.py`.

What the chunks may take is a number of bytes, `CHUNK_BYTES`. Beyond it there are the gradients
alone, of states and head, in the dtypes in which they are returned.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdistill_kernels.divergences import reference
from specdistill_kernels.divergences.reference import Mixture, mixture, wide
from specdistill_kernels.divergences.targets import (
    Head,
    RowKernel,
    Rows,
    Target,
    TargetStates,
    TargetTopK,
    prepare,
)
from specdistill_kernels.verification import warn_once

Backend = Literal["auto", "torch", "triton"]
TRITON_LACKS = frozenset({"skew_kl", "skew_rkl"})  # they would need a mixture m of their own
CHUNK_BYTES = 320 << 20  # of logits, of both sides
PART_BYTES = 32 << 20  # of a head in float32, a part at a time
MOST_CHUNKS = 64  # that are summed in bfloat16, eight bits: each is well above a unit of the sum
MOST_ROWS = 1024  # of a chunk: more of them make no product faster, and leave the caches


def divergence(
    draft_logits: Tensor,
    target: Target | None,
    *,
    loss: str | Mapping[str, float],
    temperature: float = 1.0,
    labels: Tensor | None = None,
    draft_vocab: Tensor | None = None,
    beta: float | None = None,
    skew: float | None = None,
    eta: float | None = None,
) -> Tensor:
    """The loss of each row, [N], from raw draft logits [N, Vd]: plain PyTorch, differentiable in
    them, all rows at once. Arguments as in `fused_divergence`.
    """
    num, width = draft_logits.shape
    parts = mixture(loss, beta, skew, eta)
    case = prepare(num, width, target, labels, parts, temperature, draft_vocab, reference)
    return reference.row_losses(wide(draft_logits), *case.rows(slice(None)), parts, temperature)


def fused_divergence(
    hidden: Tensor,
    head: Head,
    target: Target | None,
    *,
    loss: str | Mapping[str, float],
    temperature: float = 1.0,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    draft_vocab: Tensor | None = None,
    beta: float | None = None,
    skew: float | None = None,
    eta: float | None = None,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The sum over N tokens of weights · loss, differentiable in the draft's hidden states and
    head; never more than `chunk` rows of logits exist, by default as many as `CHUNK_BYTES` hold.

    hidden: [N, d], the draft's final hidden states. head: the draft's, of Vd tokens. target: raw
    logits [N, V], `TargetStates` or `TargetTopK`; no gradient reaches it. loss: a name or weights
    by name, as defined in `reference.py`; beta for jsd (0.5), skew for skew_kl and skew_rkl
    (0.1), eta for lk_hybrid (3). temperature: of both sides, for every loss but ce. labels: [N]
    target ids, for ce, which alone needs no target; negative ids and tokens the draft lacks are
    skipped (`draft_columns` finds them). weights: [N] float or bool, all 1 by default; a row of
    weight 0 is left out, whatever it holds. draft_vocab: [Vd] distinct target ids, where the
    draft's vocabulary is trimmed.

    Returns a scalar in float32 (float64 for float64 states). It is a sum: divide it by the tokens
    of the whole accumulated batch. Gradients are computed here, beside the loss, and scaled in the
    backward pass. The head's is summed over chunks in float32, but for that of a head in half
    precision whose sum would take more than `CHUNK_BYTES`: over up to `MOST_CHUNKS` it is rounded
    after each, to bfloat16, or to float16 with an exponent of its own for each token. There is no
    second derivative.

    backend: "torch" runs everywhere; "triton" wants triton, a GPU (or TRITON_INTERPRET=1) and
    float32, bfloat16 or float16, and has all losses but skew_kl and skew_rkl; "auto" takes triton
    on a GPU where it can, and else warns once. Raises ValueError for arguments that do not fit,
    RuntimeError where "triton" cannot run.
    """
    _check(hidden, head, chunk)
    num, dtype = len(hidden), wide(hidden[:0]).dtype
    chunk = chunk or _rows_within(CHUNK_BYTES, hidden, head, target)
    chunks: list[Rows] = [slice(start, start + chunk) for start in range(0, num, chunk)]
    if weights is None:
        weights = hidden.new_ones(num, dtype=dtype)
    elif weights.shape != (num,):
        raise ValueError(f"weights must be [{num}]; got {list(weights.shape)}")
    else:
        weights = weights.detach().to(dtype)
        live = weights.nonzero()[:, 0]
        chunks = [live[start : start + chunk] for start in range(0, len(live), chunk)]
    parts = mixture(loss, beta, skew, eta)
    kernel = _kernel(backend, hidden, parts)
    width = len(head.weight)
    case = prepare(num, width, target, labels, parts, temperature, draft_vocab, kernel)
    if torch.is_grad_enabled():
        return _Fused.apply(hidden, head.weight, head.bias, head, weights, case, chunks)
    total = hidden.new_zeros((), dtype=dtype)
    for rows in chunks:
        total += case.losses(head.logits(hidden[rows]), rows) @ weights[rows]
    return total


@torch.no_grad()
def divergence_rows(
    hidden: Tensor,
    head: Head,
    target: Target | None,
    *,
    loss: str | Mapping[str, float],
    temperature: float = 1.0,
    labels: Tensor | None = None,
    draft_vocab: Tensor | None = None,
    beta: float | None = None,
    skew: float | None = None,
    eta: float | None = None,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The terms of `fused_divergence`, [N] float32 (float64 for float64 states), by chunks too and
    without gradients.
    """
    _check(hidden, head, chunk)
    parts = mixture(loss, beta, skew, eta)
    num, width, kernel = len(hidden), len(head.weight), _kernel(backend, hidden, parts)
    case = prepare(num, width, target, labels, parts, temperature, draft_vocab, kernel)
    out = hidden.new_empty(num, dtype=wide(hidden[:0]).dtype)
    chunk = chunk or _rows_within(CHUNK_BYTES, hidden, head, target)
    for start in range(0, num, chunk):
        rows = slice(start, start + chunk)
        out[rows] = case.losses(head.logits(hidden[rows]), rows)
    return out


def _check(hidden: Tensor, head: Head, chunk: int | None) -> None:
    size = head.weight.shape[1]
    if hidden.dim() != 2 or hidden.shape[1] != size:
        raise ValueError(f"hidden must be [N, {size}] for this head; got {list(hidden.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row; got {chunk}")


def _rows_within(budget: int, hidden: Tensor, head: Head, target: Target | None) -> int:
    """How many rows' logits, of draft and target, take no more bytes than that; a multiple of 128
    where there are so many, as the tiles of products are.
    """
    half = hidden.dtype == torch.float16  # float32 beside it, see `_Fused`
    row = len(head.weight) * (6 if half else hidden.itemsize) * _copies(head)
    if isinstance(target, TargetTopK):
        row += len(head.weight) * 4
    elif isinstance(target, TargetStates):
        row += len(target.head.weight) * target.hidden.itemsize * _copies(target.head)
    rows = min(max(budget // row, 1), MOST_ROWS)
    return rows if rows < 128 else rows - rows % 128


def _copies(head: Head) -> int:
    """Matrices as large as the logits that exist while a head makes them."""
    return 1 if head.softcap is None and head.scale == 1 else 2 if head.softcap is None else 3


class _Fused(torch.autograd.Function):
    """Loss and gradients in one loop over chunks of rows; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, weights, case, chunks):  # type: ignore[no-untyped-def]
        # float16 has no place for the gradients of a wide vocabulary's logits, 1e-7 and less, nor
        # for sums of few of them before a loss scale has made them larger: those of the head have
        # an exponent for each token.
        half = hidden.dtype == torch.float16
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        sums = [torch.float32 if half else hidden.dtype]
        sums += [None if x is None else _sum_dtype(x, len(chunks)) for x in (weight, bias)]
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x, dtype=dtype) if needed else None
            for x, dtype, needed in zip(
                (hidden, weight, bias), sums, ctx.needs_input_grad[:3], strict=True
            )
        )
        exponents = None
        if of_weight is not None and of_weight.dtype == torch.float16:
            exponents = of_weight.new_ones(len(of_weight), 1, dtype=torch.float32)
        total = weights.new_zeros(())
        for rows in chunks:
            states = hidden[rows]
            logits = head.logits(states)
            if half:
                states, logits = states.float(), logits.float()
            slope = head.slope(logits)  # now: a kernel may write the gradient over the logits
            losses, gradient = case.kernel.row_gradients(
                logits, *case.rows(rows), weights[rows], case.parts, case.temperature
            )
            total += losses.sum()
            if slope is not None:
                gradient = gradient.mul_(slope)
            if of_hidden is not None:
                of_hidden[rows] = _times(gradient, weight).to(of_hidden.dtype)
            if of_weight is not None and exponents is not None:
                _add_scaled_product(of_weight, exponents, gradient, states)
            elif of_weight is not None:
                _add_product(of_weight, gradient, states)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=of_bias.dtype)
            del logits, gradient, slope  # before the next chunk's are made
        ctx.save_for_backward(of_hidden, of_weight, of_bias, exponents)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        # In place, as a head's gradient is large, unless the graph will be gone through again.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        *all_sums, exponents = ctx.saved_tensors
        factors = (upstream, upstream if exponents is None else upstream * exponents, upstream)
        scaled = [
            None if sums is None else (sums * factor if again else sums.mul_(factor)).to(dtype)
            for sums, factor, dtype in zip(all_sums, factors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _sum_dtype(parameter: Tensor, chunks: int) -> torch.dtype:
    """In which its gradient is summed over chunks; half precision would lose the later of many."""
    sums = wide(parameter[:0]).dtype
    large = parameter.dim() == 2 and parameter.numel() * sums.itemsize > CHUNK_BYTES
    return parameter.dtype if large and chunks <= MOST_CHUNKS else sums


def _times(gradient: Tensor, weight: Tensor) -> Tensor:
    """[n, V] and [V, d] to [n, d] in the gradient's dtype. A weight of another is converted by
    parts of the vocabulary: whole, it would be as large as the head's gradient.
    """
    if gradient.dtype == weight.dtype:
        return gradient @ weight
    out = gradient.new_zeros(len(gradient), weight.shape[1])
    part = max(1, PART_BYTES // (weight.shape[1] * gradient.itemsize))
    for start in range(0, len(weight), part):
        at = slice(start, start + part)
        out.addmm_(gradient[:, at], weight[at].to(gradient.dtype))
    return out


def _add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """total [V, d] += gradientᵀ states. A product's sums are rounded once, to the total's dtype if
    the factors have it, else to theirs.
    """
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, states)
    else:
        total += gradient.T @ states


def _add_scaled_product(total: Tensor, exponents: Tensor, gradient: Tensor, states: Tensor) -> None:
    """total [V, d] float16, times powers of two [V, 1] that keep each row's largest entry near 1,
    += gradientᵀ states: nothing overflows, and what is below 2**-24 of the largest is lost."""
    part = max(1, PART_BYTES // (total.shape[1] * gradient.itemsize))
    for start in range(0, len(total), part):
        at = slice(start, start + part)
        sums = gradient[:, at].T @ states
        sums += total[at] * exponents[at]
        most = sums.abs().amax(1, keepdim=True).clamp(min=2.0**-120)
        exponents[at] = most.log2().ceil().exp2()
        total[at] = sums / exponents[at]


def _kernel(backend: Backend, hidden: Tensor, parts: Mixture) -> RowKernel:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r} does not exist; choose 'auto', 'torch' or 'triton'")
    lacking = _lacking(hidden, parts)
    if backend == "auto" and lacking and hidden.is_cuda:
        warn_once(f"the loss runs in PyTorch, which takes longer than Triton: {lacking}")
    if backend == "torch" or (backend == "auto" and (lacking or not hidden.is_cuda)):
        return reference
    if lacking:
        raise RuntimeError(f"backend 'triton' cannot run: {lacking}; 'torch' runs everywhere")
    from specdistill_kernels.divergences import triton_backend

    return triton_backend


def _lacking(hidden: Tensor, parts: Mixture) -> str:
    """What Triton lacks to run this, in words; empty if nothing."""
    if absent := TRITON_LACKS & parts.weights.keys():
        return f"it has no {' and '.join(sorted(absent))}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {hidden.device} and TRITON_INTERPRET=1 is not set"
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the hidden states are {hidden.dtype}, and it takes float32, bfloat16 and float16"
    return ""
