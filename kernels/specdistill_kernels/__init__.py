"""Verification of proposed tokens for speculative sampling; needs torch, and triton only for the
GPU backend.

`sample` draws a draft token, `verify` accepts or replaces a row of them. Both take raw logits, warp
them once by the same rule (`probabilities`) and read counter-based noise, so what is verified is
what was sampled.
"""

from specdistill_kernels.dispatch import sample, verify
from specdistill_kernels.noise import Noise, counter_noise
from specdistill_kernels.reference import Drawn, Lenience, Mode, Verdict, probabilities

__all__ = [
    "Drawn",
    "Lenience",
    "Mode",
    "Noise",
    "Verdict",
    "counter_noise",
    "probabilities",
    "sample",
    "verify",
]
