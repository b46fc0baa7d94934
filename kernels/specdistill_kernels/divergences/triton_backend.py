"""The backend "triton" of `fused_divergence`: launches the kernels of `kernel.py` behind
the interface of `reference.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from specdistill_kernels.aot import Configuration
from specdistill_kernels.divergences.kernel import divergence_kernel, logsumexp_kernel
from specdistill_kernels.divergences.reference import LOSSES, Dense, Lumped, Mixture
from specdistill_kernels.tiles import INTERPRETED, TILES, Tile, tiles_for


def form(*, sums: bool, ce: bool, lumped: bool, unit: int) -> str:
    """Which of `Tiles` a launch takes."""
    if not sums:
        return "plain"
    if ce:
        return "tightest"
    return "tight" if lumped or unit == 1 else "sums"


def logsumexp(
    logits: Tensor, temperature: float, *, tile: Tile | None = None, rows: int | None = None
) -> Tensor:
    """[n, V] raw logits to float32 [n], of logits / T."""
    num, width = logits.shape
    logits = _readable(logits, logits.dtype)
    out = torch.empty(num, dtype=torch.float32, device=logits.device)
    unit = _unit(logits)
    constants = _constants(num, width, tile, rows, tiles_for(logits.device).plain)
    with torch.cuda.device_of(logits):
        logsumexp_kernel[(triton.cdiv(num, constants["ROWS"]),)](
            logits,
            out,
            num,
            width // unit,
            logits.stride(0) // unit,
            1 / temperature,
            UNIT=unit,
            **constants,
        )
    return out


def row_losses(
    draft_logits: Tensor,
    target: Dense | Lumped | None,
    labels: Tensor | None,
    parts: Mixture,
    temperature: float,
) -> Tensor:
    """[n] losses. The kernel has no form without the gradient, so it overwrites the logits too."""
    ones = torch.ones(len(draft_logits), device=draft_logits.device)
    return row_gradients(draft_logits, target, labels, ones, parts, temperature)[0]


def row_gradients(
    draft_logits: Tensor,
    target: Dense | Lumped | None,
    labels: Tensor | None,
    weights: Tensor,
    parts: Mixture,
    temperature: float,
    *,
    tile: Tile | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses [n] of contiguous draft logits, and their gradient [n, Vd] written over
    them.
    """
    num, width = draft_logits.shape
    missing = None
    if isinstance(target, Lumped):
        logits, whole, missing = _spread(target, width)
    elif target is None:  # for ce alone; the draft stands in as its own target, with weight 0
        logits, whole = draft_logits, torch.zeros(num, device=draft_logits.device)
    else:
        logits = _readable(target.logits, draft_logits.dtype)
        if target.logsumexp is None:
            whole = torch.full((num,), -torch.inf, device=draft_logits.device)
        else:
            whole = target.logsumexp.float().contiguous()
    weight = dict.fromkeys(LOSSES, 0.0) | dict(parts.weights)
    squared = temperature**2
    losses = torch.empty(num, dtype=torch.float32, device=draft_logits.device)
    unit, sums, ce = _unit(draft_logits, logits), _needs_sums(parts), labels is not None
    which = form(sums=sums, ce=ce, lumped=missing is not None, unit=unit)
    chosen: Tile = getattr(tiles_for(draft_logits.device), which)
    constants = _constants(num, width, tile, rows, chosen)
    with torch.cuda.device_of(draft_logits):
        divergence_kernel[(triton.cdiv(num, constants["ROWS"]),)](
            draft_logits,
            logits,
            whole,
            missing,
            None if labels is None else labels.contiguous(),
            weights.contiguous(),
            losses,
            num,
            width // unit,
            logits.stride(0) // unit,
            1 / temperature,
            squared,
            squared * (weight["fkl"] + weight["jeffreys"] / 2),
            squared * (weight["rkl"] + weight["jeffreys"] / 2),
            squared * weight["jsd"],
            weight["tvd"],
            weight["lk_alpha"],
            weight["lk_hybrid"],
            weight["ce"],
            parts.beta,
            parts.eta,
            LUMPED=missing is not None,
            SUMS=sums,
            CE=ce,
            UNIT=unit,
            **constants,
        )
    return losses, draft_logits


def _spread(target: Lumped, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p [n, width] of the k tokens and +inf elsewhere, for the tail; the log mass of the tail
    [n]; the mass [n] of those among the k that the draft lacks.
    """
    present, log_p = target.columns >= 0, target.log_probs.float()
    spread = log_p.new_full((len(log_p), width), torch.inf)
    at = target.columns.clamp(min=0)  # an absent token's +inf changes nothing
    spread.scatter_reduce_(1, at, torch.where(present, log_p, torch.inf), "amin")
    missing = torch.where(present, 0, log_p.exp()).sum(-1)
    return spread, target.log_tail.float().contiguous(), missing


def _readable(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """In a form that is compiled for a draft of `dtype`, and without gaps within a row."""
    forms = {dtype, torch.float32} | ({torch.float16} if dtype == torch.float32 else set())
    if logits.dtype not in forms or dtype == torch.float64:
        logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _unit(*matrices: Tensor) -> int:
    """16 where all rows start and end on 16 entries, else 1."""
    numbers = [n for x in matrices for n in (x.shape[1], x.stride(0), x.data_ptr())]
    return 16 if all(number % 16 == 0 for number in numbers) else 1


def _needs_sums(parts: Mixture) -> bool:
    return bool(set(parts.weights) - {"fkl", "ce"})


def _constants(
    num: int, width: int, tile: Tile | None, rows: int | None, chosen: Tile
) -> dict[str, int]:
    """On a GPU one row a program. The interpreter pays by the operation, so it gets large tiles."""
    if not INTERPRETED:
        tile = tile or chosen
        return {"BLOCK": tile.block, "ROWS": rows or 1, "num_warps": tile.warps}
    block = tile.block if tile else min(16384, triton.next_power_of_2(width))
    most = max(1, 65536 // block)
    rows = rows or min(most, triton.next_power_of_2(num))
    return {"BLOCK": block, "ROWS": rows, "num_warps": chosen.warps}


def configurations() -> list[Configuration]:
    """All that `TILES` may choose, for compiling ahead of time. No integer is compiled for its
    value.
    """
    pairs = [  # LUMPED, the draft's dtype, which is never float16, the target's
        *((False, dtype, dtype) for dtype in ("fp32", "bf16")),
        (False, "bf16", "fp32"),
        (False, "fp32", "fp16"),  # the draft's were float16 too
        *((True, dtype, "fp32") for dtype in ("fp32", "bf16")),
    ]
    types = dict.fromkeys(("out", "whole", "missing", "weights", "losses"), "*fp32")
    types |= dict.fromkeys(("num_rows", "width_units", "stride_units"), "i32") | {"labels": "*i64"}
    flags = list(itertools.product((False, True), repeat=2))
    found: dict[Any, Configuration] = {}

    def add(kernel: Any, pointers: dict[str, str], which: str, constants: dict[str, Any]) -> None:
        constants = {**constants, "ROWS": 1}
        signature = {
            name: (types | pointers).get(name, "fp32")
            for name in kernel.arg_names
            if name not in (*constants, "BLOCK")
        }
        for tiles in TILES.values():
            tile: Tile = getattr(tiles, which)
            sizes = {**constants, "BLOCK": tile.block}
            key = kernel, *signature.items(), *sizes.items(), tile.warps
            found[key] = Configuration(kernel, signature, sizes, tile.warps, ())

    for unit in (16, 1):
        for dtype in ("fp32", "bf16", "fp16"):
            add(logsumexp_kernel, {"logits": f"*{dtype}"}, "plain", {"UNIT": unit})
        for (lumped, draft, target), (sums, ce) in itertools.product(pairs, flags):
            absent: dict[str, Any] = {} if lumped else {"missing": None}
            absent |= {} if ce else {"labels": None}
            pointers = {"draft": f"*{draft}", "target": f"*{target}"}
            flagged = {"LUMPED": lumped, "SUMS": sums, "CE": ce, "UNIT": unit}
            which = form(sums=sums, ce=ce, lumped=lumped, unit=unit)
            add(divergence_kernel, pointers, which, {**flagged, **absent})
    return list(found.values())
