"""`verify` timed: against plain PyTorch, eager and compiled, and against other projects' kernels.

Every contender verifies the same proposals from the same bfloat16 logits, in a CUDA graph. The
share of the copy bandwidth counts only the bytes that have to move at least: the target's rows once
and, where a proposal may be rejected, one row of the draft (with its logsumexp stored as it was
sampled). A figure below 1 has room above it; an L2 cache that holds the logits can lift it past 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_plain import plain_greedy, plain_verify
from bench.gpu_session import Session
from bench.gpu_timing import Stopwatch
from bench.rivals import Batch, verifiers
from specdistill_kernels import RowSettings, sample, verify

OURS = "ours"
MODES: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top-p": {"temperature": 0.7, "top_p": 0.95},
    "top-k": {"temperature": 0.7, "top_k": 50},
    "greedy": {"temperature": 0.0},
}


@dataclass(frozen=True)
class Shape:
    mode: str
    batch: int
    num: int
    vocab: int
    compiled: bool = False  # against torch.compile alone, which takes seconds to compile


def shapes(smoke: bool) -> Iterator[Shape]:
    """What matters most first: the time may end before the list does."""
    if smoke:
        for mode in MODES:
            yield Shape(mode, 2, 2, 256)
        return
    for batch in (1, 32, 8, 128):
        for mode in MODES:
            yield Shape(mode, batch, 5, 151_936)
    for batch in (1, 32):
        for mode in MODES:
            yield Shape(mode, batch, 5, 151_936, compiled=True)
    for num in (3, 7):
        for batch in (1, 32):
            for mode in MODES:
                yield Shape(mode, batch, num, 151_936)
    for vocab in (32_000, 128_256):
        for mode in MODES:
            yield Shape(mode, 8, 5, vocab)


def run(session: Session) -> None:
    watch = Stopwatch(session)
    session.report["copy_bytes_per_second"] = copied = watch.bandwidth()
    session.report["empty_graph_microseconds"] = watch.nothing()
    for shape in shapes(session.smoke):
        what = f"{shape.mode}, B={shape.batch}, G={shape.num}, V={shape.vocab}"
        what += ", compiled" * shape.compiled
        session.case(what, partial(time_shape, session, watch, shape, copied, what))
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def time_shape(session: Session, watch: Stopwatch, shape: Shape, copied: float, what: str) -> None:
    entry = measure(session, watch, shape, copied)
    session.add("timings", **vars(shape), **entry)
    ours = entry["contenders"][OURS]
    print(f"  {what}: {ours.get('cold', float('nan')):.1f} µs", flush=True)
    sound = "cold" in ours and entry["differing_rows"] <= 1  # a near-tie
    session.check(f"{what}: as the reference", sound, **ours)


def measure(session: Session, watch: Stopwatch, shape: Shape, copied: float) -> dict[str, Any]:
    batch, options, calls, reasons = contenders(session, shape)
    rows = shape.num + 1 + (shape.mode != "greedy")
    floor = shape.batch * shape.vocab * batch.target_logits.element_size() * rows
    found: dict[str, dict[str, Any]] = {
        name: {"unavailable": reason} for name, reason in reasons.items()
    }
    for name, (call, scope) in calls.items():
        try:
            accepted = call().double().mean().item()
            found[name] = watch.time(call) | {"mean_accepted": accepted, "scope": scope}
        except (
            Exception
        ) as error:  # anything, of other people's code; ours must not: see time_shape
            found[name] = {"raised": f"{type(error).__name__}: {error}"[:2000]}
    ours = found[OURS]
    for entry in found.values():
        if "cold" in entry and "cold" in ours:
            entry["times_ours_cold"] = entry["cold"] / ours["cold"]
            entry["times_ours_warm"] = entry["warm"] / ours["warm"]
            entry["share_of_copy_cold"] = floor / (entry["cold"] * 1e-6) / copied
    tokens = (
        verify(batch.draft_tokens, batch.draft_logits, batch.target_logits, **options, backend=b)[0]
        for b in (session.backend, "reference")
    )
    differing = int(torch.ne(*tokens).any(-1).sum()) if "cold" in ours else None
    return {"floor_bytes": floor, "differing_rows": differing, "contenders": found}


def contenders(
    session: Session, shape: Shape
) -> tuple[Batch, dict[str, Any], dict[str, tuple[Callable[[], Tensor], str]], dict[str, str]]:
    """The batch, with what `verify` wants besides; calls that return the number of accepted
    proposals, each with what it includes; and why others are missing.
    """
    settings = MODES[shape.mode]
    num, device = shape.num, session.device
    target = (3 * session.normal(shape.batch, num + 1, shape.vocab)).to(torch.bfloat16)
    noise = 0.5 * session.normal(shape.batch, num, shape.vocab)
    draft = (target[:, :num] + noise).to(torch.bfloat16)
    del noise
    temperature = torch.full((shape.batch,), settings["temperature"], device=device)
    seeds = session.integers(2**62, shape.batch)
    rows = RowSettings(temperature, seeds, torch.zeros_like(seeds))
    if "top_p" in settings:
        rows = rows._replace(top_p=torch.full_like(temperature, settings["top_p"]))
    if "top_k" in settings:
        rows = rows._replace(top_k=torch.full_like(seeds, settings["top_k"]))
    drawn = [sample(draft[:, i], rows, position=i, backend=session.backend) for i in range(num)]
    tokens = torch.stack([d.tokens for d in drawn], 1)
    lse = torch.stack([d.logsumexp for d in drawn], 1)
    batch = Batch(tokens, draft, target, **settings)
    lengths = torch.full((shape.batch,), num, device=device)
    options: dict[str, Any] = {"rows": rows, "lengths": lengths}

    def ours(stored: Tensor | None) -> Callable[[], Tensor]:
        return lambda: (
            verify(
                tokens, draft, target, **options, draft_lse=stored, backend=session.backend
            ).num_accepted
        )

    def plain(transform: Callable[[Any], Any]) -> Callable[[], Tensor]:
        if shape.mode == "greedy":
            step = transform(plain_greedy)
            return lambda: step(tokens, target)[1]
        step = transform(plain_verify)
        filters = (settings.get("top_k"), settings.get("top_p"))
        return lambda: step(tokens, draft, target, temperature, *filters)[1]

    calls = {OURS: (ours(lse), "raw logits, stored logsumexp of the draft")}
    reasons: dict[str, str] = {}
    if shape.compiled:
        torch.compiler.reset()
        scope = "raw logits; compiled for these very shapes"
        calls["torch compiled"] = (plain(lambda step: torch.compile(step, dynamic=False)), scope)
        return batch, options, calls, reasons
    scope = "raw logits; noise from torch's generator"
    calls["torch eager"] = (plain(lambda step: step), scope)
    if shape.mode != "greedy":
        calls["ours, logsumexp anew"] = (ours(None), "raw logits alone")
    for rival in verifiers(batch):
        if rival.call is None:
            reasons[rival.name] = rival.reason
        else:
            calls[rival.name] = (rival.call, rival.scope)
    return batch, options, calls, reasons
