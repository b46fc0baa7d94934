"""A draft cut over the processes of a run, by torch's FSDP (2304.11277): each holds a part of every
weight, its gradient and its optimiser state, and layers are put together for as long as they run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Cut a module in place: each of its layers by itself, and what is left together."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes hold, cut as another is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:  # the number of steps, say
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
