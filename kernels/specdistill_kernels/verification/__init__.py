"""`verify` and `sample`: arguments are checked once, then the backend runs that was asked for."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from specdistill_kernels.verification import reference
from specdistill_kernels.verification.noise import Noise, counter_noise
from specdistill_kernels.verification.reference import (
    Drawn,
    Lenience,
    Mode,
    RowSettings,
    Verdict,
)

Backend = Literal["auto", "triton", "reference"]


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    rows: RowSettings,
    *,
    lengths: Tensor,
    draft_vocab: Tensor | None = None,
    draft_lse: Tensor | None = None,
    point_mass: Tensor | None = None,
    mode: Mode = "token",
    lenience: Lenience | None = None,
    noise: Noise = counter_noise,
    backend: Backend = "auto",
) -> Verdict:
    """Speculative sampling (2211.17192): the emitted tokens follow the target's distribution
    whatever the draft.

    draft_tokens: [B, G] int64 in target ids; -1 ends a row's proposals. draft_logits: [B, G, Vd]
    raw logits the tokens were drawn from by `sample` with the same `rows`, or None for a draft that
    proposes with certainty. target_logits: [B, G+1, V] raw. lengths: [B] proposals that count in
    each row.

    draft_vocab: [Vd] sorted target ids of the draft's logits when its vocabulary is trimmed.
    draft_lse: [B, G] the logsumexp that `sample` returned, which saves a pass. point_mass: [B]
    bool, rows that proposed with certainty although draft_logits is given. mode: "token", or
    "block" (2403.10444): the same distribution, and on average at least as many accepted tokens.
    lenience makes acceptance LOSSY; it has no effect at temperature 0, where p is 0 or 1.

    backend: "auto" takes "triton" for logits in a GPU's memory where it can (triton is installed,
    the logits are not float64 and of one dtype, rows are contiguous, `noise` is the default), and
    "reference" otherwise, with a warning once; both emit the same tokens. "triton" says why where
    it cannot.

    At temperature 0 the draft's logits are not read. A draft row without a finite maximum is a
    rejection. Where the target's own row has none, the token is -1 and the caller must stop. Raises
    ValueError for shapes or options that do not fit, and for a backend that does not exist or
    cannot take these arguments.
    """
    batch, num = draft_tokens.shape
    if target_logits.shape[:2] != (batch, num + 1):
        raise ValueError(
            f"target_logits must be [{batch}, {num + 1}, V] for draft_tokens [{batch}, {num}]; "
            f"got {list(target_logits.shape)}"
        )
    if draft_logits is not None and draft_logits.shape[:2] != (batch, num):
        raise ValueError(
            f"draft_logits must be [{batch}, {num}, Vd]; got {list(draft_logits.shape)}"
        )
    if draft_logits is not None:
        width = target_logits.shape[-1] if draft_vocab is None else len(draft_vocab)
        if draft_logits.shape[-1] != width:
            raise ValueError(f"draft_logits must be {width} wide; got {draft_logits.shape[-1]}")
    if mode not in ("token", "block"):
        raise ValueError(f"mode must be 'token' or 'block'; got {mode!r}")
    if lenience is not None and not (
        lenience.kind in ("lin", "sq", "exp") and 0 < lenience.epsilon <= 1 and mode == "token"
    ):
        raise ValueError(
            f"lenience must be lin, sq or exp with 0 < epsilon <= 1, in mode 'token'; got "
            f"{lenience.kind} with {lenience.epsilon} in mode {mode!r}"
        )
    if draft_logits is None and not (draft_lse is None and point_mass is None):
        raise ValueError("draft_lse and point_mass say something about draft_logits, which is None")
    for name, value, shape in (
        ("lengths", lengths, [batch]),
        *((name, value, [batch]) for name, value in rows._asdict().items()),
        ("draft_lse", draft_lse, [batch, num]),
        ("point_mass", point_mass, [batch]),
    ):
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{name} must be {shape}; got {list(value.shape)}")
    arguments = (draft_tokens, draft_logits, target_logits, rows)
    options: dict[str, Any] = {
        "lengths": lengths,
        "draft_vocab": draft_vocab,
        "draft_lse": draft_lse,
        "point_mass": point_mass,
        "mode": mode,
        "lenience": lenience,
    }
    if _takes_triton(backend, noise, target_logits, draft_logits):
        from specdistill_kernels.verification import triton_backend

        return triton_backend.verify(*arguments, **options)
    return reference.verify(*arguments, **options, noise=noise)


def sample(
    logits: Tensor,
    rows: RowSettings,
    *,
    position: int,
    noise: Noise = counter_noise,
    backend: Backend = "auto",
) -> Drawn:
    """Draw one draft token per row: [B, Vd] raw logits to indices into them, with the logsumexp
    that `verify` takes. Arguments as there; position is the token's place in the round (0 to G-1).
    """
    if _takes_triton(backend, noise, logits):
        from specdistill_kernels.verification import triton_backend

        return triton_backend.sample(logits, rows, position=position)
    return reference.sample(logits, rows, position=position, noise=noise)


def sample_places(
    logits: Tensor,
    rows: RowSettings,
    *,
    noise: Noise = counter_noise,
    backend: Backend = "auto",
) -> Drawn:
    """Draw a draft token at every place of a round whose logits [B, G, Vd] are there at once, as a
    parallel draft's are: `sample` of each place, [B, G].
    """
    if _takes_triton(backend, noise, logits):
        from specdistill_kernels.verification import triton_backend

        return triton_backend.sample_places(logits, rows)
    return reference.sample_places(logits, rows, noise=noise)


def _takes_triton(backend: str, noise: Noise, *logits: Tensor | None) -> bool:
    """Whether the Triton backend is to run. Raises ValueError where it was asked for and cannot."""
    if backend == "reference":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(
            f"backend {backend!r} does not exist; choose 'auto', 'triton' or 'reference'"
        )
    hindrance = _hindrance(backend, noise, [x for x in logits if x is not None])
    if hindrance and backend == "triton":
        raise ValueError(f"the Triton backend cannot run: {hindrance}, or choose 'reference'")
    if hindrance and all(x is None or x.is_cuda for x in logits):
        warn_once(f"drawing and verifying run in PyTorch, many times slower: {hindrance}")
    return not hindrance


@functools.cache
def warn_once(message: str) -> None:
    """Of a slower backend on a GPU, where nothing else would show that it was taken."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _hindrance(backend: str, noise: Noise, logits: list[Tensor]) -> str:
    """Why the Triton backend cannot run, with what would help; empty if it can."""
    if not all(x.is_cuda for x in logits):
        if backend == "auto":
            return "the logits are not on a GPU"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"the logits are on {logits[0].device}; move them to a GPU, set TRITON_INTERPRET=1 "
                "before triton is imported to have the kernels interpreted"
            )
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if noise is not counter_noise:
        return "its noise is counter_noise; leave `noise` alone"
    dtypes = {x.dtype for x in logits}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return (
            f"the logits are {' and '.join(sorted(map(str, dtypes)))}; cast them to one of "
            "float32, bfloat16 and float16"
        )
    if any(x.stride(-1) != 1 for x in logits):
        return "the entries of a row of logits do not lie side by side; call .contiguous()"
    return ""
