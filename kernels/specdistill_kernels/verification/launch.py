"""What the launches of `triton_backend` share: tile sizes, the logits as the kernels take them, the
workspace, and passing arguments by name.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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


def tiles_for(batch: int, num: int, width: int) -> Tiles:
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


class Side(NamedTuple):
    """The logits of one model as the kernels take them: [B, G, V] with rows that are contiguous."""

    logits: Tensor
    width: int
    stride_b: int
    stride_g: int

    @staticmethod
    def of(logits: Tensor) -> Side:
        return Side(logits, logits.shape[-1], logits.stride(0), logits.stride(1))

    def in_units(self, unit: int) -> tuple[int, int, int]:
        return self.width // unit, self.stride_b // unit, self.stride_g // unit

    def aligned(self) -> bool:
        numbers = (self.width, self.stride_b, self.stride_g, self.logits.data_ptr())
        return all(number % 16 == 0 for number in numbers)


def workspace(device: torch.device, sizes: dict[str, int]) -> dict[str, Tensor]:
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


def inverse_of(vocab: Tensor, width: int) -> Tensor:
    """[V] int32, the draft's column of each target id, -1 for those it lacks: 4 bytes a token of
    the target, shared by all requests. Made once for a tensor, which must not change."""
    inverse = _INVERSES.get(vocab)
    if inverse is None or len(inverse) != width:
        inverse = torch.full((width,), -1, dtype=torch.int32, device=vocab.device)
        inverse[vocab] = torch.arange(len(vocab), dtype=torch.int32, device=vocab.device)
        _INVERSES[vocab] = inverse
    return inverse


class Launcher:
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
