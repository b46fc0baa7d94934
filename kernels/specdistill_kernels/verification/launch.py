"""What the launches of `triton_backend` share: how work is cut up, the logits as the kernels take
them, the workspace, and passing arguments by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from specdistill_kernels.tiles import INTERPRETED, Tile, Tiles, tiles_for


class Division(NamedTuple):
    """How the work of a call is cut up, all of it. Neither the batch nor the other model's
    vocabulary has a say in how a row is, so that its statistics are the same to the last bit
    wherever it is met. Only the filters' programs take more than one tile, one after the other.
    """

    stats: Tile
    race: Tile
    tally: Tile
    cut: Tile
    programs: int  # that count for filters, if there are not more rows
    rounds: int = 4  # of tallies, at most 4: a row's words have room for these
    room: int = 4096  # candidates a row may have
    rows: int = 1  # rows or requests of a program, but
    filter_rows: int = 1  # rows of one that filters
    positions: int = 8  # proposals looked at together
    least_parts: int = 64  # so that widths up to 262,144 share one compiled form

    @classmethod
    def of(cls, tiles: Tiles) -> Division:
        """On a GPU."""
        return cls(tiles.stats, tiles.race, tiles.tally, tiles.cut, tiles.programs)

    def parts(self, tile: Tile, width: int) -> int:
        """For how many parts a kernel is compiled, a power of two."""
        return max(self.least_parts, triton.next_power_of_2(triton.cdiv(width, tile.block)))


def division_for(device: torch.device, batch: int, num: int, width: int) -> Division:
    if not INTERPRETED:
        return Division.of(tiles_for(device))
    # The interpreter pays by the operation: one tile holds as much as a tensor may.
    block = min(triton.next_power_of_2(width), 2**16)
    rows = min(triton.next_power_of_2(batch * (num + 1)), 2**18 // block)
    parts = triton.next_power_of_2(triton.cdiv(width, block))
    positions = triton.next_power_of_2(num + 1)
    rows = max(1, min(rows, 2**18 // (parts * positions), 2**12))
    filtered = max(1, min(rows, 2**17 // block))
    tile = Tile(block, 4)
    return Division(
        *(tile, tile, tile, tile),
        programs=Tiles().programs,
        rounds=2,
        rows=rows,
        filter_rows=filtered,
        positions=positions,
        least_parts=1,
    )


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
    """One allocation for all, each aligned to 64 bytes. `firsts` and `arrived` are int32, `search`
    is int64, the others float32."""
    kinds = {"firsts": torch.int32, "arrived": torch.int32, "search": torch.int64}
    words = [size * (2 if name == "search" else 1) for name, size in sizes.items()]
    padded = [triton.cdiv(count, 16) * 16 for count in words]
    parts = torch.empty(sum(padded), dtype=torch.float32, device=device).split(padded)
    return {
        name: part.view(kinds.get(name, torch.float32))
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

    def __init__(self, division: Division, **arguments: Any) -> None:
        self.division = division
        self.arguments = arguments
        width = arguments["width_units"] * arguments["UNIT"]
        self.races = triton.cdiv(width, division.race.block)

    def __call__(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        constants = {"GP": self.division.positions, "ROWS": self.division.rows, "BLOCK": tile.block}
        known = {**self.arguments, **constants, **more}
        names = [name for name in kernel.arg_names if name in known]
        kernel[grid](**{name: known[name] for name in names}, num_warps=tile.warps)
