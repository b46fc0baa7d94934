"""How a request wants its tokens drawn, and the per-row tensors of a batch of such wishes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdistill.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Applied in this order, ties
    kept.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or more; got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1 (off); got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise InputError(f"min_p must be at least 0 (off) and below 1; got {self.min_p}")


GREEDY = Sampling()


@dataclass
class SamplingBatch:
    """Sampling settings by row, as `verify` takes them; a filter that no row uses is None. All
    tensors [B].
    """

    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seeds: Tensor

    @classmethod
    def build(
        cls, samplings: list[Sampling], seeds: list[int], device: torch.device
    ) -> SamplingBatch:
        def column(values: list[float], off: float, dtype: torch.dtype) -> Tensor | None:
            return (
                None
                if all(v == off for v in values)
                else torch.tensor(values, dtype=dtype, device=device)
            )

        return cls(
            torch.tensor([s.temperature for s in samplings], dtype=torch.float64, device=device),
            column([s.top_k for s in samplings], 0, torch.int64),
            column([s.top_p for s in samplings], 1.0, torch.float64),
            column([s.min_p for s in samplings], 0.0, torch.float64),
            torch.tensor(seeds, dtype=torch.int64, device=device),
        )

    def arguments(self) -> dict[str, Any]:
        """As the keyword arguments of `sample` and `verify`: both must see the same settings."""
        return vars(self)


def row_seed(seed: int, request_id: str) -> int:
    """A row's own 63-bit seed from the run's seed and the request's id, so that its draws do not
    depend on its slot.
    """
    digest = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
