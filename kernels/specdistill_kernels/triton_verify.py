"""`verify` and `sample` in Triton: launches, workspaces, tile sizes. Agrees with `reference` token
for token under the same noise.

Logits are read as they are, in their own dtype and strides; nothing of their size is written.
`stats_kernel` goes over the rows, `filter_kernel` (with top-k, top-p or min-p alone) finds each
row's cut, `excess_kernel` (in mode "block" alone) sums what block verification needs, and
`verdict_kernel` or `sample_kernel` decides and draws.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specdistill_kernels.reference import Drawn, Lenience, Mode, Verdict
from specdistill_kernels.triton_accept import excess_kernel
from specdistill_kernels.triton_draw import sample_kernel, verdict_kernel
from specdistill_kernels.triton_filter import filter_kernel
from specdistill_kernels.triton_rows import INTS, stats_kernel

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEY_SHIFT = {"fp32": 0, "bf16": 16, "fp16": 13}  # low bits that are 0 in float32 of this dtype
PIVOTS = 8


class Tiles(NamedTuple):
    """How the work is cut up. Neither the batch nor the other model's vocabulary has a say in how a
    row is, so that its statistics are the same to the last bit wherever it is met."""

    block: int  # tokens in a tile
    part_tiles: int  # tiles of a part of the vocabulary; each program takes one part
    rows: int  # rows or requests of a program
    filter_block: int
    filter_rows: int
    positions: int  # proposals looked at together
    max_parts: int  # power of two


BLOCK, FILTER_BLOCK, POSITIONS = 1024, 1024, 8
PART_TILES, MAX_PARTS = 4, 64  # for up to 262,144 tokens; more parts beyond
WARPS, FILTER_WARPS = 4, 16


def _tiles(batch: int, num: int, width: int) -> Tiles:
    if os.environ.get("TRITON_INTERPRET") != "1":
        parts = max(MAX_PARTS, triton.next_power_of_2(triton.cdiv(width, BLOCK * PART_TILES)))
        return Tiles(BLOCK, PART_TILES, 1, FILTER_BLOCK, 1, POSITIONS, parts)
    # The interpreter pays by the operation: one tile holds as much as a tensor may.
    block = min(triton.next_power_of_2(width), 2**16)
    rows = min(triton.next_power_of_2(batch * (num + 1)), 2**18 // block)
    parts = triton.next_power_of_2(triton.cdiv(width, block))
    positions = triton.next_power_of_2(num + 1)
    rows = max(1, min(rows, 2**18 // (parts * positions)))
    return Tiles(block, 1, rows, block, max(1, min(rows, 2**17 // block)), positions, parts)


class _Side(NamedTuple):
    """The logits of one model as the kernels take them: [B, G, V] with rows that are contiguous."""

    logits: Tensor
    width: int
    stride_b: int
    stride_g: int

    @staticmethod
    def of(logits: Tensor) -> _Side:
        return _Side(logits, logits.shape[-1], logits.stride(0), logits.stride(1))

    def in_units(self, unit: int) -> tuple[int, int, int]:
        return self.width // unit, self.stride_b // unit, self.stride_g // unit

    def aligned(self) -> bool:
        numbers = (self.width, self.stride_b, self.stride_g, self.logits.data_ptr())
        return all(number % 16 == 0 for number in numbers)


def _workspace(device: torch.device, sizes: dict[str, int]) -> dict[str, Tensor]:
    """One allocation of 4-byte numbers for all, each aligned to 16 of them. `firsts` and `arrived`
    are int32, the others float32."""
    padded = [triton.cdiv(size, 16) * 16 for size in sizes.values()]
    parts = torch.empty(sum(padded), dtype=torch.float32, device=device).split(padded)
    integers = ("firsts", "arrived")
    return {
        name: part.view(torch.int32) if name in integers else part
        for name, part in zip(sizes, parts, strict=True)
    }


_INVERSES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _inverse(vocab: Tensor, width: int) -> Tensor:
    """[V] int32, the draft's column of each target id, -1 for those it lacks: 4 bytes a token of
    the target, shared by all requests. Made once for a tensor, which must not change."""
    inverse = _INVERSES.get(vocab)
    if inverse is None or len(inverse) != width:
        inverse = torch.full((width,), -1, dtype=torch.int32, device=vocab.device)
        inverse[vocab] = torch.arange(len(vocab), dtype=torch.int32, device=vocab.device)
        _INVERSES[vocab] = inverse
    return inverse


class _Launcher:
    """Passes arguments to kernels by name; what is not a tensor of this call is a number."""

    def __init__(self, tiles: Tiles, **arguments: Any) -> None:
        self.tiles = tiles
        self.arguments = arguments

    def __call__(self, kernel: Any, grid: tuple[int, ...], **more: Any) -> None:
        tiles = self.tiles
        constants = {"GP": tiles.positions, "SP": tiles.max_parts, "ROWS": tiles.rows}
        known = {**self.arguments, **constants, "BLOCK": tiles.block, "num_warps": WARPS, **more}
        names = [name for name in kernel.arg_names if name in known]
        options = {"num_warps": known["num_warps"]}
        kernel[grid](**{name: known[name] for name in names}, **options)


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    lengths: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    draft_vocab: Tensor | None,
    draft_lse: Tensor | None,
    point_mass: Tensor | None,
    mode: Mode,
    lenience: Lenience | None,
    tiles: Tiles | None = None,
) -> Verdict:
    """As `reference.verify`, with `counter_noise`. Two launches, one more with filters and one
    more in mode "block". `dispatch` has checked the arguments.
    """
    target = _Side.of(target_logits)
    draft = target if draft_logits is None else _Side.of(draft_logits)
    batch, num = draft_tokens.shape
    device = target_logits.device
    tokens = torch.empty(batch, num + 1, dtype=torch.int64, device=device)
    accepted = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0:
        return Verdict(tokens, accepted)
    tiles = tiles or _tiles(batch, num, target.width)
    filtered = not (top_k is None and top_p is None and min_p is None)
    kind, epsilon = ("lin", 1.0) if lenience is None else (lenience.kind, lenience.epsilon)
    lengths = lengths.to(torch.int64).contiguous()
    temperature = temperature.to(torch.float32).contiguous()
    inverse = None if draft_vocab is None else _inverse(draft_vocab, target.width)
    launch = _launcher(target, draft, batch, num, tiles, temperature, filtered)
    more = {
        "tokens": draft_tokens.to(torch.int64).contiguous(),
        "lengths": lengths,
        "seeds": seeds.to(torch.int64).contiguous(),
        "steps": step.to(torch.int64).contiguous(),
        "certain": _or(point_mass, lengths.view(torch.int8), torch.int8),
        "inverse": _or(inverse, lengths.view(torch.int32), torch.int32),
        "draft_lse": _or(draft_lse, temperature, torch.float32),
        "out_tokens": tokens,
        "out_accepted": accepted,
        "draft_rows": int(draft_logits is not None),
        "has_certain": int(point_mass is not None),
        "has_lse": int(draft_lse is not None),
        "trimmed": int(draft_vocab is not None),
        "block_mode": int(mode == "block" and num > 0),
        "power": epsilon if kind == "exp" else 1.0,
        "divisor": {"lin": epsilon, "sq": epsilon**2, "exp": 1.0}[kind],
    }
    launch.arguments |= more
    draft_rows = batch * num if draft_logits is not None else 0
    if draft_lse is not None and not filtered:
        draft_rows = 0
    parts = launch.arguments["splits"]
    with torch.cuda.device_of(target_logits):
        _statistics(launch, batch * (num + 1), draft_rows, top_k, top_p, min_p)
        if mode == "block" and num > 1:
            launch(excess_kernel, (triton.cdiv(batch * (num - 1), tiles.rows), parts))
        launch(verdict_kernel, (triton.cdiv(batch, tiles.rows), parts))
    return Verdict(tokens, accepted)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    step: Tensor,
    position: int,
    tiles: Tiles | None = None,
) -> Drawn:
    """As `reference.sample`, with `counter_noise`. Two launches, one more with filters. `dispatch`
    has checked the arguments."""
    batch = len(logits)
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logsumexp = torch.empty(batch, dtype=torch.float32, device=logits.device)
    if batch == 0:
        return Drawn(tokens, logsumexp)
    side = _Side.of(logits[:, None])
    tiles = tiles or _tiles(batch, 0, side.width)
    filtered = not (top_k is None and top_p is None and min_p is None)
    temperature = temperature.to(torch.float32).contiguous()
    seeds = seeds.to(torch.int64).contiguous()
    launch = _launcher(side, side, batch, 0, tiles, temperature, filtered)
    launch.arguments |= {
        "logits": logits,
        "tokens": seeds,  # There are no proposals, whatever these two say.
        "lengths": seeds,
        "certain": seeds.view(torch.int8),
        "has_certain": 0,
        "seeds": seeds,
        "steps": step.to(torch.int64).contiguous(),
        "position": position,
        "out_tokens": tokens,
        "out_lse": logsumexp,
    }
    with torch.cuda.device_of(logits):
        _statistics(launch, batch, 0, top_k, top_p, min_p)
        grid = (triton.cdiv(batch, tiles.rows), launch.arguments["splits"])
        launch(sample_kernel, grid)
    return Drawn(tokens, logsumexp)


def _or(value: Tensor | None, stand_in: Tensor, dtype: torch.dtype) -> Tensor:
    """An argument in the form the kernels take, or any tensor of its dtype where it is absent."""
    return stand_in if value is None else value.to(dtype).contiguous()


def _launcher(
    target: _Side,
    draft: _Side,
    batch: int,
    num: int,
    tiles: Tiles,
    temperature: Tensor,
    filtered: bool,
) -> _Launcher:
    unit = 16 if target.aligned() and draft.aligned() else 1
    width, target_b, target_g = target.in_units(unit)
    draft_width, draft_b, draft_g = draft.in_units(unit)
    parts = tiles.max_parts
    rows = batch * (2 * num + 1)
    space = _workspace(
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
    return _Launcher(
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
    launch: _Launcher,
    target_rows: int,
    draft_rows: int,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
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
        top_k=_or(top_k, arguments["lengths"], torch.int64),
        top_p=_or(top_p, arguments["temperature"], torch.float32),
        min_p=_or(min_p, arguments["temperature"], torch.float32),
        has_k=int(top_k is not None),
        has_p=int(top_p is not None),
        has_min=int(min_p is not None),
        SHIFT=KEY_SHIFT[dtype],
        PIVOTS=PIVOTS,
        ROWS=rows,
        BLOCK=tiles.filter_block,
        num_warps=FILTER_WARPS,
    )


class Configuration(NamedTuple):
    """One compiled form that a launch above can ask for. Pointers are aligned to 16 bytes."""

    kernel: Any
    signature: dict[str, str]  # of the arguments that are not constants
    constexprs: dict[str, Any]
    num_warps: int
    divisible_by_16: tuple[str, ...]  # integer arguments


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
                constants = {
                    "UNIT": unit,
                    "GP": POSITIONS,
                    "SP": MAX_PARTS,
                    "ROWS": 1,
                    "BLOCK": FILTER_BLOCK if filtering else BLOCK,
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
