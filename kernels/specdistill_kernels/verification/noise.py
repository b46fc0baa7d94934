"""Counter-based noise: 32 random bits as a pure function of (seed, step, position, domain, token).

Nothing here has state, so a draw does not depend on the batch a row sits in, on padding, or on how
a kernel splits the vocabulary. Drafting, the acceptance coin and the final draw read separate
domains: sharing one biases the output.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAFT, COIN, FINAL = 1, 2, 3

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1
_SALTS = (0x243F6A88, 0x85A308D3)


class Noise(Protocol):
    def __call__(
        self, seeds: Tensor, step: Tensor, position: Tensor, domain: int, tokens: Tensor
    ) -> Tensor:
        """seeds, step, position: [...] int64; tokens: [N] int64. Returns [..., N] int64 in [0,
        2**32).
        """
        ...


Words = TypeVar("Words", Tensor, NDArray[Any])


def _mix(x: Words, key: Words | None = None) -> Words:
    """A 32-bit finaliser (xorshift, multiply, twice), in place; `key` enters half-way. Of int64
    products, which wrap modulo 2**64, only the low word is kept.
    """
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= _MASK
    if key is not None:
        x ^= key
    x ^= x >> 15
    x *= 0x846CA68B
    x &= _MASK
    x ^= x >> 16
    return x


def counter_noise(
    seeds: Tensor, step: Tensor, position: Tensor, domain: int, tokens: Tensor
) -> Tensor:
    """The noise the engine and the kernels use.

    A row's key is 64 bits wide, two words chained over the same numbers from different salts, so
    that two rows or steps share a stream with probability 2**-64 only. The first word shifts the
    token's counter, the second enters in the middle of the finaliser.
    """
    if tokens.device.type != "cpu":
        salts = torch.tensor(_SALTS, device=seeds.device)
        return _bits(_parts(seeds, step, position, tokens, domain), salts)
    # NumPy has words of 32 bits, and small arrays cost it less.
    arrays = _parts(seeds.numpy(), step.numpy(), position.numpy(), tokens.numpy(), domain)
    narrow = tuple(part.astype(np.uint32) for part in arrays)
    with np.errstate(over="ignore"):
        bits = _bits(narrow, np.array(_SALTS, np.uint32))
    return torch.from_numpy(bits.astype(np.int64))


def _parts(
    seeds: Words, step: Words, position: Words, tokens: Words, domain: int
) -> tuple[Words, ...]:
    """What a token's noise depends on, in words of 32 bits."""
    place = (step * 256 + position) * 4 + domain
    return seeds & _MASK, (seeds >> 32) & _MASK, place & _MASK, tokens & _MASK


def _bits(parts: tuple[Words, ...], salts: Words) -> Words:
    """The noise of `_parts`, whose words may lie in wider integers."""
    low, high, place, tokens = parts
    words = _mix(low[..., None] ^ salts)
    for value in (high, place):
        words = _mix((words + (value * _GOLDEN)[..., None]) & _MASK)
    shift, key = words[..., :1], words[..., 1:]
    return _mix((tokens * _GOLDEN + shift) & _MASK, key)


def coin(bits: Tensor) -> Tensor:
    """Uniform in [0, 1) on a grid of 2**-32, float64; exactly 0 occurs and must be harmless."""
    return bits.double() * 2.0**-32


def exponential(bits: Tensor) -> Tensor:
    """Standard exponential, float32. The small values, which win a race, keep full relative
    precision down to 2**-33; the largest is finite (16.6), since a token that is certain must win
    its race whatever its noise.
    """
    minus_u = bits.float().add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1)
    return minus_u.log1p_().neg_()
