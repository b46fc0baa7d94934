"""`verify` and `sample` in Triton: launches, workspaces, tile sizes. Agrees with `reference` token
for token under the same noise.

Logits are read as they are, in their own dtype and strides; nothing of their size is written.
`stats_kernel` goes over the rows, `filter_kernel` (with top-k, top-p or min-p alone) finds each
row's cut, `excess_kernel` (in mode "block" alone) sums what block verification needs, and
`verdict_kernel` or `sample_kernel` decides and draws.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from specdistill_kernels.aot import Configuration
from specdistill_kernels.verification.accept import excess_kernel
from specdistill_kernels.verification.draw import sample_kernel, verdict_kernel
from specdistill_kernels.verification.filter import filter_kernel
from specdistill_kernels.verification.launch import (
    BLOCK,
    FILTER_BLOCK,
    FILTER_WARPS,
    MAX_PARTS,
    POSITIONS,
    WARPS,
    Launcher,
    Side,
    Tiles,
    inverse_of,
    tiles_for,
    workspace,
)
from specdistill_kernels.verification.reference import Drawn, Lenience, Mode, RowSettings, Verdict
from specdistill_kernels.verification.rows import INTS, stats_kernel

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEY_SHIFT = {"fp32": 0, "bf16": 16, "fp16": 13}  # low bits that are 0 in float32 of this dtype
PIVOTS = 8


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    rows: RowSettings,
    *,
    lengths: Tensor,
    draft_vocab: Tensor | None,
    draft_lse: Tensor | None,
    point_mass: Tensor | None,
    mode: Mode,
    lenience: Lenience | None,
    tiles: Tiles | None = None,
) -> Verdict:
    """As `reference.verify`, with `counter_noise`. Two launches, one more with filters and one
    more in mode "block". `verification` has checked the arguments.
    """
    target = Side.of(target_logits)
    draft = target if draft_logits is None else Side.of(draft_logits)
    batch, num = draft_tokens.shape
    device = target_logits.device
    tokens = torch.empty(batch, num + 1, dtype=torch.int64, device=device)
    accepted = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return Verdict(tokens, accepted)
    tiles = tiles or tiles_for(batch, num, target.width)
    kind, epsilon = ("lin", 1.0) if lenience is None else (lenience.kind, lenience.epsilon)
    lengths = lengths.to(torch.int64).contiguous()
    temperature = rows.temperature.to(torch.float32).contiguous()
    inverse = None if draft_vocab is None else inverse_of(draft_vocab, target.width)
    launch = _launcher(target, draft, batch, num, tiles, temperature, rows.filtered)
    launch.arguments |= {
        "tokens": draft_tokens.to(torch.int64).contiguous(),
        "lengths": lengths,
        "seeds": rows.seeds.to(torch.int64).contiguous(),
        "steps": rows.step.to(torch.int64).contiguous(),
        "certain": _or(point_mass, lengths.view(torch.int8), torch.int8),
        "inverse": _or(inverse, lengths.view(torch.int32), torch.int32),
        "draft_lse": _or(draft_lse, temperature, torch.float32),
        "out_tokens": tokens,
        "out_accepted": accepted,
        "has_q": int(draft_logits is not None),
        "has_certain": int(point_mass is not None),
        "has_lse": int(draft_lse is not None),
        "trimmed": int(draft_vocab is not None),
        "block_mode": int(mode == "block" and num > 0),
        "power": epsilon if kind == "exp" else 1.0,
        "divisor": {"lin": epsilon, "sq": epsilon**2, "exp": 1.0}[kind],
    }
    draft_rows = batch * num if draft_logits is not None else 0
    if draft_lse is not None and not rows.filtered:
        draft_rows = 0
    parts = launch.arguments["splits"]
    with torch.cuda.device_of(target_logits):
        _statistics(launch, batch * (num + 1), draft_rows, rows)
        if mode == "block" and num > 1:
            launch(excess_kernel, (triton.cdiv(batch * (num - 1), tiles.rows), parts))
        # Rows without alignment take more registers; with whole tiles some targets would spill.
        pieces = 4 if launch.arguments["UNIT"] == 1 and tiles.block >= 4 else 1
        launch(
            verdict_kernel,
            (triton.cdiv(batch, tiles.rows), parts),
            BLOCK=tiles.block // pieces,
            part_tiles=tiles.part_tiles * pieces,
        )
    return Verdict(tokens, accepted)


def sample(
    logits: Tensor, rows: RowSettings, *, position: int, tiles: Tiles | None = None
) -> Drawn:
    """As `reference.sample`, with `counter_noise`. Two launches, one more with filters. The
    arguments have been checked."""
    batch = len(logits)
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logsumexp = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if batch == 0:
        return Drawn(tokens, logsumexp)
    side = Side.of(logits[:, None])
    tiles = tiles or tiles_for(batch, 0, side.width)
    temperature = rows.temperature.to(torch.float32).contiguous()
    seeds = rows.seeds.to(torch.int64).contiguous()
    launch = _launcher(side, side, batch, 0, tiles, temperature, rows.filtered)
    launch.arguments |= {
        "logits": logits,
        "tokens": seeds,  # There are no proposals, whatever these two say.
        "lengths": seeds,
        "certain": seeds.view(torch.int8),
        "has_certain": 0,
        "seeds": seeds,
        "steps": rows.step.to(torch.int64).contiguous(),
        "position": position,
        "out_tokens": tokens,
        "out_lse": logsumexp,
    }
    with torch.cuda.device_of(logits):
        _statistics(launch, batch, 0, rows)
        grid = (triton.cdiv(batch, tiles.rows), launch.arguments["splits"])
        launch(sample_kernel, grid)
    return Drawn(tokens, logsumexp)


def _or(value: Tensor | None, stand_in: Tensor, dtype: torch.dtype) -> Tensor:
    """An argument in the form the kernels take, or any tensor of its dtype where it is absent."""
    return stand_in if value is None else value.to(dtype).contiguous()


def _launcher(
    target: Side,
    draft: Side,
    batch: int,
    num: int,
    tiles: Tiles,
    temperature: Tensor,
    filtered: bool,
) -> Launcher:
    unit = 16 if target.aligned() and draft.aligned() else 1
    width, target_b, target_g = target.in_units(unit)
    draft_width, draft_b, draft_g = draft.in_units(unit)
    parts = tiles.max_parts
    rows = batch * (2 * num + 1)
    space = workspace(
        target.logits.device,
        {
            "peaks": rows * parts,
            "masses": (rows + batch * num) * parts,  # the last of them for block verification
            "firsts": batch * (num + 1) * parts,
            "cuts": rows,
            "logsumexps": rows,
            "race": batch * 4 * parts,
            "arrived": batch,
        },
    )
    return Launcher(
        tiles,
        target=target.logits,
        draft=draft.logits,
        temperature=temperature,
        batch=batch,
        num=num,
        width_units=width,
        draft_width_units=draft_width,
        target_b=target_b,
        target_g=target_g,
        draft_b=draft_b,
        draft_g=draft_g,
        part_tiles=tiles.part_tiles,
        splits=triton.cdiv(target.width, tiles.part_tiles * tiles.block),
        filtered=int(filtered),
        UNIT=unit,
        **space,
    )


def _statistics(
    launch: Launcher,
    target_rows: int,
    draft_rows: int,
    settings: RowSettings,
) -> None:
    """The launches that leave each row's peak, mass and cut in the workspace."""
    tiles, arguments = launch.tiles, launch.arguments
    blocks = triton.cdiv(target_rows, tiles.rows) + triton.cdiv(draft_rows, tiles.rows)
    launch(stats_kernel, (blocks, arguments["splits"]))
    if not arguments["filtered"]:
        return
    rows = tiles.filter_rows
    dtype = DTYPES[arguments["target"].dtype]
    launch(
        filter_kernel,
        (triton.cdiv(target_rows, rows) + triton.cdiv(draft_rows, rows),),
        top_k=_or(settings.top_k, arguments["lengths"], torch.int64),
        top_p=_or(settings.top_p, arguments["temperature"], torch.float32),
        min_p=_or(settings.min_p, arguments["temperature"], torch.float32),
        has_k=int(settings.top_k is not None),
        has_p=int(settings.top_p is not None),
        has_min=int(settings.min_p is not None),
        SHIFT=KEY_SHIFT[dtype],
        PIVOTS=PIVOTS,
        ROWS=rows,
        BLOCK=tiles.filter_block,
        num_warps=FILTER_WARPS,
    )


_LOGITS = ("target", "draft", "logits")
_POINTERS = dict.fromkeys(
    ("tokens", "lengths", "seeds", "steps", "top_k", "out_tokens", "out_accepted"), "*i64"
) | {"certain": "*i8", "inverse": "*i32", "firsts": "*i32"}
_POINTERS |= {"arrived": "*i32"} | dict.fromkeys(
    ("temperature", "top_p", "min_p", "draft_lse", "peaks", "masses", "cuts", "logsumexps"), "*fp32"
)
_POINTERS |= {"race": "*fp32", "out_lse": "*fp32"}


def configurations() -> list[Configuration]:
    """Every one of them up to 262,144 tokens, for compiling ahead of time: a kernel, a dtype, and
    whether all rows start and end on 16 entries. No integer is compiled for its value.
    """
    found = []
    for kernel in (stats_kernel, filter_kernel, excess_kernel, verdict_kernel, sample_kernel):
        for dtype in DTYPES.values():
            for unit in (16, 1):
                filtering = kernel is filter_kernel
                unaligned = kernel is verdict_kernel and unit == 1
                constants = {
                    "UNIT": unit,
                    "GP": POSITIONS,
                    "SP": MAX_PARTS,
                    "ROWS": 1,
                    "BLOCK": FILTER_BLOCK if filtering else BLOCK // (4 if unaligned else 1),
                    "SHIFT": KEY_SHIFT[dtype],
                    "PIVOTS": PIVOTS,
                }
                types = _POINTERS | dict.fromkeys(_LOGITS, f"*{dtype}")
                types |= dict.fromkeys(INTS, "i32") | {"power": "fp32", "divisor": "fp32"}
                names = kernel.arg_names
                found.append(
                    Configuration(
                        kernel,
                        {name: types[name] for name in names if name not in constants},
                        {name: constants[name] for name in names if name in constants},
                        FILTER_WARPS if filtering else WARPS,
                        (),
                    )
                )
    return found
