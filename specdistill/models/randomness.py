"""Seeds for what draws from torch's global generator and takes no other, and building models that
draw nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch draws by `seed`, on the CPU and on `device`; after it as if nothing had been
    drawn: the state belongs to the program that calls.
    """
    place = torch.device(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Unfilled(TorchFunctionMode):
    """Within it modules are made with weights that are allocated and not drawn: filling billions of
    them takes minutes, for nothing where all are copied in afterwards. What is computed (rotary
    frequencies and other buffers that no checkpoint holds) is there as ever, which it would not be
    on the meta device.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        # By the name, since Transformers has functions of its own in torch's place.
        if getattr(func, "__name__", "").endswith(_FILLS):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in _DRAWS:
            kwargs.pop("generator", None)
            func = _DRAWS[func]
        return func(*args, **kwargs)


_FILLS = ("normal_", "uniform_", "random_", "exponential_")  # also of kaiming_uniform_ and its like
_DRAWS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.randn: torch.empty,
    torch.rand: torch.empty,
    torch.randn_like: torch.empty_like,
    torch.rand_like: torch.empty_like,
}
