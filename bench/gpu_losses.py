"""`fused_divergence` timed against plain autograd over all logits at once, and Liger-Kernel: one
forward and backward pass from hidden states to the gradients of hidden states and head, and the
memory it takes at its peak beyond its inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_session import Session
from bench.gpu_timing import Stopwatch
from bench.rivals import liger_forward_kl
from specdistill_kernels import Head, TargetStates, divergence, fused_divergence

TOLERANCE = 2e-2  # between the sums over rows that the contenders return, in bfloat16


@dataclass(frozen=True)
class Shape:
    loss: str
    rows: int
    width: int  # of the hidden states, target's and draft's
    vocab: int


def shapes(smoke: bool) -> list[Shape]:
    losses: tuple[str, ...] = ("fkl", "jsd", "tvd", "lk_hybrid", "rkl", "lk_alpha", "ce")
    if smoke:
        return [Shape(loss, 12, 8, 67) for loss in losses[:2]]
    return [Shape(loss, 4096, 2048, 151_936) for loss in losses] + [
        Shape("fkl", 4096, 1024, 32_000),
        Shape("fkl", 1024, 4096, 128_256),
    ]


def run(session: Session) -> None:
    watch = Stopwatch(session)
    for shape in shapes(session.smoke):
        what = f"{shape.loss}, {shape.rows} x {shape.width} x {shape.vocab}"
        session.case(what, partial(time_shape, session, watch, shape, what))


def time_shape(session: Session, watch: Stopwatch, shape: Shape, what: str) -> None:
    found = measure(session, watch, shape)
    plain = found["torch"].get("value")
    for entry in found.values():
        if plain is not None and "value" in entry:
            entry["difference"] = abs(entry["value"] - plain) / abs(plain)
    session.add("timings", **vars(shape), contenders=found)
    ours = found["ours, triton" if session.triton else "ours, torch"]
    print(f"  {what}: {ours.get('microseconds', float('nan')) / 1e3:.2f} ms", flush=True)
    sound = "microseconds" in ours and ours.get("difference", 0.0) <= TOLERANCE
    session.check(f"{what}: ours is sound", sound, **ours)


def measure(session: Session, watch: Stopwatch, shape: Shape) -> dict[str, dict[str, Any]]:
    half = torch.bfloat16
    of_target, weight_of_target = (
        x.to(half)
        for x in (
            session.normal(shape.rows, shape.width),
            session.normal(shape.vocab, shape.width) * 2 * shape.width**-0.5,
        )
    )
    hidden = session.normal(shape.rows, shape.width).to(half).requires_grad_()
    weight = (weight_of_target.float() * 0.7).to(half).requires_grad_()
    labels = session.integers(shape.vocab, shape.rows)
    states = TargetStates(of_target, Head(weight_of_target))

    def fused(backend: Any) -> Callable[[], Tensor]:
        return lambda: fused_divergence(
            hidden, Head(weight), states, loss=shape.loss, labels=labels, backend=backend
        )

    def plain() -> Tensor:
        with torch.no_grad():
            target = states.head.logits(states.hidden)
        rows = divergence(Head(weight).logits(hidden), target, loss=shape.loss, labels=labels)
        return rows.sum()

    calls: dict[str, Callable[[], Tensor]] = {"torch": plain, "ours, torch": fused("torch")}
    if session.triton:
        calls["ours, triton"] = fused("triton")
    found: dict[str, dict[str, Any]] = {}
    if shape.loss == "fkl":
        rival = liger_forward_kl(hidden, weight, of_target, weight_of_target)
        if rival.call is None:
            found[rival.name] = {"unavailable": rival.reason}
        else:
            calls[rival.name] = rival.call

    for name, forward in calls.items():

        def step(forward: Callable[[], Tensor] = forward) -> Tensor:
            hidden.grad = weight.grad = None
            total = forward()
            total.backward()
            return total.detach()

        try:
            value = float(step())
            hidden.grad = weight.grad = None
            found[name] = {
                "value": value,
                "peak_bytes": watch.peak_bytes(step),
                "microseconds": watch.once(step),
            }
        except (
            Exception
        ) as error:  # anything, of other people's code; ours must not: see time_shape
            found[name] = {"raised": f"{type(error).__name__}: {error}"[:2000]}
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
    return found
