"""What torch is asked to do, seen below its Python: modes that watch every operation."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Draws(TorchDispatchMode):
    """Notes what draws random numbers. Attention and dropout draw none in `eval`, and tensors of
    the meta device hold none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        idle = any(word in str(func) for word in ("attention", "dropout"))
        idle = idle or (isinstance(out, Tensor) and out.is_meta)
        if torch.Tag.nondeterministic_seeded in func.tags and not idle:
            self.names.append(str(func))
        return out
