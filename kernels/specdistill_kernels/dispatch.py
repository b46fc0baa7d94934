"""The public ops: argument checks once, then the backend that was asked for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from specdistill_kernels import reference
from specdistill_kernels.noise import Noise, counter_noise
from specdistill_kernels.reference import Verdict

Backend = Literal["auto", "reference"]


def verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    lengths: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor,
    step: Tensor,
    draft_vocab: Tensor | None = None,
    noise: Noise = counter_noise,
    backend: Backend = "auto",
) -> Verdict:
    """Speculative sampling (2211.17192): the emitted tokens follow the target's distribution
    whatever the draft.

    draft_tokens: [B, G] int64 in target ids. draft_logits: [B, G, Vd] raw logits the tokens were
    drawn from by `sample` with the same temperature and filters, or None for a draft that proposes
    with certainty. target_logits: [B, G+1, V] raw. lengths: [B] proposals that count in each row;
    temperature (0 = greedy), top_k (0 = off), top_p (1 = off), min_p (0 = off), seeds, step: [B].
    draft_vocab: [Vd] target id of each draft logit when the draft's vocabulary is trimmed. At
    temperature 0 the draft's logits are not read. A draft row without a finite maximum is a
    rejection. Where the target's own row has none, the token is -1 and the caller must stop. Raises
    ValueError for shapes that do not fit or a backend that does not exist.
    """
    _check_backend(backend)
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
    for name, value in (
        ("lengths", lengths),
        ("temperature", temperature),
        ("seeds", seeds),
        ("step", step),
    ):
        if value.shape != (batch,):
            raise ValueError(f"{name} must be [{batch}]; got {list(value.shape)}")
    return reference.verify(
        draft_tokens,
        draft_logits,
        target_logits,
        lengths=lengths,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        step=step,
        draft_vocab=draft_vocab,
        noise=noise,
    )


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor,
    step: Tensor,
    position: int,
    noise: Noise = counter_noise,
    backend: Backend = "auto",
) -> Tensor:
    """Draw one draft token per row: [B, Vd] raw logits to [B] int64 indices into them. Arguments as
    in `verify`; position is the token's place in the round (0 to G-1).
    """
    _check_backend(backend)
    return reference.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        step=step,
        position=position,
        noise=noise,
    )


def _check_backend(backend: str) -> None:
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} does not exist; choose 'auto' or 'reference'")
