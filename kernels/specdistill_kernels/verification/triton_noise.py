"""`noise.py` in Triton: the same 32 random bits, bit for bit, and exponentials to a few ulp."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
DRAFT = tl.constexpr(1)
COIN = tl.constexpr(2)
FINAL = tl.constexpr(3)


@triton.jit
def _mix(x, key):
    """The 32-bit finaliser; uint32 products wrap by themselves. key = 0 is none."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) ^ key
    x = x ^ (x >> 15)
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


@triton.jit
def exponential(bits):
    """Standard exponential, -log(1 - u) for u = (bits + 1/2) / 2**32, exact in the small values.

    1 - u = f / k with k a power of two and f in [sqrt(1/2), sqrt(2)). f - 1 = (k - 1) - k u needs
    no rounding where u is small (k = 1), which log(1 - u) would. log f = 2 atanh((f-1) / (f+1)).
    """
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 0.999999940395355224609375)
    exponent = ((1.0 - u).to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    k = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    t = (k - 1.0) - k * u
    z = t / (2.0 + t)
    w = z * z
    odd = 1.0 + w * (0.33333334 + w * (0.2 + w * (0.14285715 + w * 0.11111111)))
    return -(exponent.to(tl.float32) * 0.6931472 + 2.0 * z * odd)
