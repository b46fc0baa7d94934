"""`noise.py` in Triton: the same 32 random bits, bit for bit, and exponentials to a few ulp."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from triton.language import core

from specdistill_kernels.verification.rows import INTERPRETED

GOLDEN = tl.constexpr(0x9E3779B1)
DRAFT = tl.constexpr(1)
COIN = tl.constexpr(2)
FINAL = tl.constexpr(3)


@triton.jit
def _mix(x, key):
    """The 32-bit finaliser; uint32 products wrap by themselves. key = 0 is none. Shifts and `xor`
    commute, so that the key costs a token nothing."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15) ^ (key ^ (key >> 15))
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _word(seed, place, SALT: tl.constexpr):
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    x = _mix(low ^ SALT, 0)
    x = _mix(x + high * GOLDEN, 0)
    return _mix(x + place.to(tl.uint32) * GOLDEN, 0)


@triton.jit
def stream(seed, step, position, DOMAIN: tl.constexpr):
    """The two words (shift, key) of a row's stream; all arguments int64 of one shape."""
    place = (step * 256 + position) * 4 + DOMAIN
    return _word(seed, place, 0x243F6A88), _word(seed, place, 0x85A308D3)


@triton.jit
def random_bits(shift, key, token):
    """uint32, for each int32 token of the stream."""
    return _mix(token.to(tl.uint32) * GOLDEN + shift, key)


@core.extern
def _fast_log2(x, _semantic=None):
    """libdevice has it for CUDA alone: one instruction, off by at most 2**-22."""
    if _semantic.builder.options.backend_name != "cuda":
        return tl.log2(x, _semantic=_semantic)
    symbol = {(tl.float32,): ("__nv_fast_log2f", tl.float32)}
    return core.extern_elementwise("", "", [x], symbol, is_pure=True, _semantic=_semantic)


@triton.jit
def log2(x):
    return tl.log2(x) if INTERPRETED else _fast_log2(x)


@triton.jit
def exponential(bits):
    """Standard exponential in units of log 2, as a race asks for none: -log2(1 - u) for u =
    (bits + 1/2) / 2**32. Where u is small 1 - u would round it away: there u times a polynomial,
    within 4e-8 of the quotient.
    """
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    series = 0.20762555 + u * 0.49022421
    series = 1.442695 + u * (0.72136265 + u * (0.48021063 + u * (0.37192595 + u * series)))
    log = log2(tl.maximum(1.0 - u, 5.9604644775390625e-08))
    return tl.where(u < 0.25, u * series, -log)
