"""The fused losses in value and gradient against plain autograd over all rows at once."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.gpu_session import Session
from specdistill_kernels import Head, TargetStates, divergence, fused_divergence, keep_top_k
from specdistill_kernels.divergences import TRITON_LACKS
from specdistill_kernels.divergences.reference import LOSSES

# ‖ours − plain‖ / ‖plain‖. Both take the same product for the logits; half precision then rounds
# the gradient of a logit to 8 or 11 bits, in sums of another order.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float16: 1e-2}
MIXTURE: Mapping[str, float] = {"fkl": 0.7, "tvd": 0.2, "ce": 0.1}
UPSTREAM = 1.7
CLOSE = 1e-5  # of log p and log q, in float32


def check_losses(session: Session, widest: bool, share: float = 1.0) -> None:
    """Every loss at the widest vocabulary in bfloat16, the dtype of training, or all others; the
    torch path has the CPU's tests besides.
    """
    first = "triton" if session.triton else "torch", 67 if session.smoke else 151_936
    cases = [(first, torch.bfloat16)]
    if not widest:
        grid = [] if session.smoke else [first, (first[0], 4_099), ("torch", 4_099)]
        others = product(dict.fromkeys(grid), TOLERANCE)
        cases = [case for case in others if case not in cases]
    for ((backend, width), dtype), target in product(cases, ("states", "top-k", "trimmed")):
        for loss in (*LOSSES, MIXTURE):
            name = loss if isinstance(loss, str) else "mixture"
            if backend == "triton" and name in TRITON_LACKS:
                continue
            kind = str(dtype).removeprefix("torch.")
            what = f"loss {name}, {backend}, {kind}, V={width}, target {target}"
            case = (backend, dtype, width, loss, target)
            session.case(what, partial(check_loss, session, what, *case), share)


def check_loss(
    session: Session,
    what: str,
    backend: Any,
    dtype: torch.dtype,
    width: int,
    loss: str | Mapping[str, float],
    kind: str,
) -> None:
    errors = compare(session, backend, dtype, width, loss, kind)
    session.check(what, max(errors.values()) <= TOLERANCE[dtype], **errors)


def compare(
    session: Session,
    backend: Any,
    dtype: torch.dtype,
    width: int,
    loss: str | Mapping[str, float],
    kind: str,
) -> dict[str, float]:
    """Relative differences of the loss and its gradients, upstream gradient not 1."""
    num, size = (19, 8) if session.smoke else (131, 64)
    kept = None
    if kind == "trimmed":
        kept = session.uniform(width).topk(width // 3).indices.sort().values
    hidden = session.normal(num, size).to(dtype)
    of_target = (session.normal(width, size) * 2 * size**-0.5).to(dtype)
    weight = (session.normal(width if kept is None else len(kept), size) * size**-0.5).to(dtype)
    hidden_of_target = session.normal(num, size).to(dtype)
    head_of_target = Head(of_target)
    said = head_of_target.logits(hidden_of_target)
    target: Any = TargetStates(hidden_of_target, head_of_target)
    exact: Any = said.double()
    temperature = 0.8
    if kind == "top-k":
        target = exact = keep_top_k(said, min(20, width // 2), temperature=temperature)
    weights = session.integers(3, num).float()  # a third of them 0
    options: dict[str, Any] = {
        "loss": loss,
        "temperature": temperature,
        "labels": session.integers(width, num),
        "draft_vocab": kept,
    }

    def gradients(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        return [total.detach(), *torch.autograd.grad(UPSTREAM * total, leaves)]

    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    fused = fused_divergence(
        ours[0], Head(ours[1]), target, weights=weights, chunk=num // 3, backend=backend, **options
    )
    # In float64, but for the product that makes the logits: it rounds as the one of `ours`.
    plain = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = Head(plain[1]).logits(plain[0])
    logits = logits + (Head(weight).logits(hidden).double() - logits).detach()
    rows = divergence(logits, exact, **options)
    jumps = (weights * UPSTREAM)[:, None] * kinks(logits.detach(), exact, loss, temperature, kept)
    slack = hidden.new_zeros(()), jumps @ plain[1].detach().abs(), jumps.T @ plain[0].detach().abs()
    triples = zip(
        gradients(fused, ours), gradients((rows * weights).sum(), plain), slack, strict=True
    )
    names = ("value", "hidden", "head")
    return {name: relative(*triple) for name, triple in zip(names, triples, strict=True)}


def kinks(
    logits: Tensor,
    target: Any,
    loss: str | Mapping[str, float],
    temperature: float,
    vocab: Tensor | None,
) -> Tensor:
    """[N, Vd] by how much the gradient of each draft logit may differ, as p and q are so close that
    rounding decides which of them min(p, q) is.
    """
    parts = {loss: 1.0} if isinstance(loss, str) else loss
    log_q = (logits / temperature).log_softmax(-1)
    if isinstance(target, Tensor):
        log_p = (target / temperature).log_softmax(-1)
        log_p = log_p if vocab is None else log_p[:, vocab]
    else:  # no token of the tail is compared alone
        log_p = torch.full_like(log_q, torch.inf)
        log_p.scatter_(1, target.tokens, target.log_probs.double())
    close = (log_p - log_q).abs() < CLOSE
    alpha = torch.minimum(log_p, log_q).exp().sum(-1, keepdim=True)
    jump = parts.get("tvd", 0.0) + parts.get("lk_hybrid", 0.0) + parts.get("lk_alpha", 0.0) / alpha
    return torch.where(close, log_q.exp() * jump / temperature, 0)


def relative(a: Tensor, b: Tensor, slack: Tensor) -> float:
    """‖a − b‖ / ‖b‖, less what each number may differ by; infinite where it is none."""
    difference = (a.double() - b.double()).abs() - slack
    error = float(difference.clamp(min=0).norm() / b.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")
