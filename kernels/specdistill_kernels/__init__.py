"""Verification of proposed tokens for speculative sampling, and losses to distil the draft; needs
torch, and triton only for the GPU backend.

`sample` draws a draft token, `verify` accepts or replaces a row of them. Both take raw logits, warp
them once by the same rule (`probabilities`) and read counter-based noise, so what is verified is
what was sampled.

`fused_divergence` goes from hidden states and heads to a distillation loss and its gradients and
never holds the logits of all tokens; `divergence` is the same in plain PyTorch, all at once.
"""

from specdistill_kernels.divergences import divergence, divergence_rows, fused_divergence
from specdistill_kernels.divergences.targets import (
    Head,
    TargetStates,
    TargetTopK,
    draft_columns,
    keep_top_k,
)
from specdistill_kernels.verification import sample, sample_places, verify
from specdistill_kernels.verification.noise import Noise, counter_noise
from specdistill_kernels.verification.reference import (
    Drawn,
    Lenience,
    Mode,
    RowSettings,
    Verdict,
    probabilities,
)

__all__ = [
    "Drawn",
    "Head",
    "Lenience",
    "Mode",
    "Noise",
    "RowSettings",
    "TargetStates",
    "TargetTopK",
    "Verdict",
    "counter_noise",
    "divergence",
    "divergence_rows",
    "draft_columns",
    "fused_divergence",
    "keep_top_k",
    "probabilities",
    "sample",
    "sample_places",
    "verify",
]
