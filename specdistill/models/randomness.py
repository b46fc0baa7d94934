"""Seeds for what draws from torch's global generator and takes no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch draws by `seed`, on the CPU and on `device`; after it as if nothing had been
    drawn: the state belongs to the program that calls.
    """
    place = torch.device(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
