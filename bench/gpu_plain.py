"""Verification as one writes it in plain PyTorch: the baseline that the kernels are timed against.

Unlike the package's reference it never waits for the device, so that it can be compiled and held by
a CUDA graph, and it draws from torch's own generator. Its top-k is one number for the whole batch.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def plain_probabilities(
    logits: Tensor, temperature: Tensor, top_k: int | None, top_p: float | None
) -> Tensor:
    """[B, G, V] raw logits to float32 probabilities; temperature: [B]."""
    x = logits.float() / temperature[:, None, None]
    if top_k is not None:
        x = x.masked_fill(x < x.topk(top_k, -1).values[..., -1:], -torch.inf)
    if top_p is not None:
        ordered, order = x.sort(-1, descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p
        x = x.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return x.softmax(-1)


def plain_verify(
    draft_tokens: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    temperature: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (2211.17192); shapes and results as in `specdistill_kernels.verify`."""
    batch, num = draft_tokens.shape
    p = plain_probabilities(target_logits, temperature, top_k, top_p)
    q = plain_probabilities(draft_logits, temperature, top_k, top_p)
    x = draft_tokens[..., None]
    p_x, q_x = p[:, :num].gather(-1, x)[..., 0], q.gather(-1, x)[..., 0]
    accept = torch.rand_like(q_x) * q_x < p_x
    num_accepted = accept.long().cumprod(-1).sum(-1)
    row = torch.arange(batch, device=p.device)
    rejected = (num_accepted < num)[:, None]
    weights = p[row, num_accepted]
    weights = (weights - q[row, num_accepted.clamp(max=num - 1)] * rejected).clamp(min=0)
    noise = -torch.log1p(-torch.rand_like(weights))
    return _assemble(draft_tokens, num_accepted, (weights / noise.clamp(min=TINY)).argmax(-1))


def plain_greedy(draft_tokens: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same at temperature 0."""
    first = target_logits.argmax(-1)
    num_accepted = (first[:, :-1] == draft_tokens).long().cumprod(-1).sum(-1)
    final = first.gather(-1, num_accepted[:, None])[:, 0]
    return _assemble(draft_tokens, num_accepted, final)


def _assemble(draft_tokens: Tensor, num_accepted: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(draft_tokens.shape[1] + 1, device=final.device)
    padded = torch.cat([draft_tokens, final[:, None]], -1)
    padded = torch.where(index < num_accepted[:, None], padded, -1)
    return padded.scatter(-1, num_accepted[:, None], final[:, None]), num_accepted
