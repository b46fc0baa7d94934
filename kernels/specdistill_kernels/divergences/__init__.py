"""Distillation losses from hidden states: head, divergence and gradients by chunks of rows, so that
memory grows with the chunk and not with the number of tokens. The losses themselves are defined in
`reference.py`.
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
from specdistill_kernels.divergences.targets import Head, RowKernel, Rows, Target, prepare
from specdistill_kernels.verification import warn_once

Backend = Literal["auto", "torch", "triton"]
TRITON_LACKS = frozenset({"skew_kl", "skew_rkl"})  # they would need a mixture m of their own


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
    chunk: int = 1024,
    backend: Backend = "auto",
) -> Tensor:
    """The sum over N tokens of weights · loss, differentiable in the draft's hidden states and
    head; never more than `chunk` rows of logits exist.

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
    backward pass; the head's is summed over chunks in float32. There is no second derivative.

    backend: "torch" runs everywhere; "triton" wants triton, a GPU (or TRITON_INTERPRET=1) and
    float32, bfloat16 or float16, and has all losses but skew_kl and skew_rkl; "auto" takes triton
    on a GPU where it can, and else warns once. Raises ValueError for arguments that do not fit,
    RuntimeError where "triton" cannot run.
    """
    _check(hidden, head, chunk)
    num, dtype = len(hidden), wide(hidden[:0]).dtype
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
    chunk: int = 1024,
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
    for start in range(0, num, chunk):
        rows = slice(start, start + chunk)
        out[rows] = case.losses(head.logits(hidden[rows]), rows)
    return out


def _check(hidden: Tensor, head: Head, chunk: int) -> None:
    size = head.weight.shape[1]
    if hidden.dim() != 2 or hidden.shape[1] != size:
        raise ValueError(f"hidden must be [N, {size}] for this head; got {list(hidden.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 row; got {chunk}")


class _Fused(torch.autograd.Function):
    """Loss and gradients in one loop over chunks of rows; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, weights, case, chunks):  # type: ignore[no-untyped-def]
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight, of_bias = (  # a sum over chunks: bfloat16 would lose the later ones
            torch.zeros_like(x, dtype=weights.dtype) if needed else None
            for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        # float16 has no place for the gradients of a wide vocabulary's logits, 1e-7 and less.
        half = hidden.dtype == torch.float16
        factor = weight.float() if half else weight
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
                gradient = gradient * slope
            if of_hidden is not None:
                of_hidden[rows] = (gradient @ factor).to(hidden.dtype)
            if of_weight is not None:
                if of_weight.dtype == gradient.dtype == states.dtype:
                    of_weight.addmm_(gradient.T, states)
                else:
                    of_weight += gradient.T @ states
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=of_bias.dtype)
            del logits, gradient  # before the next chunk's are made
        ctx.save_for_backward(
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        scaled = [None if saved is None else saved * upstream for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


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
