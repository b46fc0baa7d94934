"""How the work of all kernels is cut up: the one table a tuner fills, by device class."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tile(NamedTuple):
    """Entries of the vocabulary that a program takes at once, and its warps."""

    block: int
    warps: int


class Tiles(NamedTuple):
    """Of verification: the statistics (and, in mode "block", the excess) of a part of a row, the
    race over a part, and what a filter counts, or takes of a row's candidates, at a time. How many
    programs count for the filters of a call, where it has not more rows.

    Of the losses: four entries a thread, as with eight some would spill registers; many warps a
    row, as a chunk has few rows for a large GPU.
    """

    stats: Tile = Tile(4096, 4)
    race: Tile = Tile(2048, 4)
    tally: Tile = Tile(1024, 4)
    cut: Tile = Tile(1024, 16)
    programs: int = 528  # four on each of 132 processors
    plain: Tile = Tile(1024, 8)  # fkl, ce and logsumexp
    sums: Tile = Tile(1024, 8)  # another loss of the whole target, in aligned rows
    tight: Tile = Tile(512, 4)  # another loss otherwise: of lumped tails, or in other rows
    tightest: Tile = Tile(256, 4)  # another loss beside ce


TILES = {"": Tiles()}  # by compute capability; "" is any other device


def device_class(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tiles_for(device: torch.device) -> Tiles:
    return TILES.get(device_class(device), TILES[""])
