"""What is kept of the target at a response position, by name: "states", its final hidden state and
logsumexp, from which its head makes all logits again; "top-k:64", its 64 most probable tokens and
the mass of all others; "none".
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from specdistill.errors import InputError
from specdistill.limits import shown
from specdistill.models import LanguageModel
from specdistill_kernels import keep_top_k

STATES, NONE = "states", "none"
ALPHA_COST = "alpha_cost"  # for the manifest; no tensor of the cache


def kept_tokens(signal: str) -> int | None:
    """The k of "top-k:k"; None for the other kinds. Raises `InputError` for no kind at all."""
    match = re.fullmatch(r"top-k:([1-9][0-9]{0,17})", signal)
    if match is None and signal not in (STATES, NONE):
        raise InputError(f"a signal is {STATES!r}, 'top-k:64' or {NONE!r}; got {shown(signal)}")
    return None if match is None else int(match[1])


def bytes_per_token(target: LanguageModel, signal: str) -> int:
    """states: d values in the head's dtype, a logsumexp in that of the logits. top-k: an id in 4
    bytes and a log-probability in 2 for each token, the tail's in 4.
    """
    if (k := kept_tokens(signal)) is not None:
        if k >= target.vocab_size:
            raise InputError(
                f"signal {signal!r} keeps {k} tokens of a target that has {target.vocab_size}; "
                f"keep fewer, or {STATES!r}, which is exact"
            )
        return k * 6 + 4
    logsumexp = torch.promote_types(target.dtype, torch.float32).itemsize
    states = target.head.weight.shape[1] * target.dtype.itemsize + logsumexp
    return states if signal == STATES else 0


def keep(
    target: LanguageModel, hidden: Tensor, logsumexp: Tensor, signal: str
) -> dict[str, Tensor]:
    """The tensors [n, ...] kept of n positions, from the target's final hidden states [n, d] and
    logsumexp [n]. Top-k also gives `ALPHA_COST` [n], see `alpha_cost`.
    """
    k = kept_tokens(signal)
    if k is None:
        return {"hidden": hidden, "logsumexp": logsumexp}
    logits = target.logits(hidden)
    top = keep_top_k(logits, k)
    return {
        "tokens": top.tokens.int(),
        "log_probs": top.log_probs.half(),
        "log_tail": top.log_tail.float(),
        ALPHA_COST: alpha_cost(logits, top.tokens),
    }


def token_log_probs(
    model: LanguageModel, hidden: Tensor, logsumexp: Tensor, tokens: list[int]
) -> Tensor:
    """log p of n tokens, [n], from the final hidden states [n, d] and logsumexp [n] of the
    positions that predict them: only these rows of the head are multiplied.
    """
    ids = torch.tensor(tokens, device=hidden.device)
    kind = torch.promote_types(model.dtype, torch.float32)
    logits = (hidden.to(kind) * model.head.weight[ids].to(kind)).sum(-1)
    if model.head.bias is not None:
        logits = logits + model.head.bias[ids]
    return model.scale_logits(logits) - logsumexp


@torch.inference_mode()
def read_states(target: LanguageModel, prompt: list[int], response: list[int]) -> dict[str, Tensor]:
    """The target's final hidden states [n, d] and logsumexp [n] over n response tokens that another
    model wrote, by one pass.
    """
    tokens = torch.tensor([prompt + response], device=target.device)
    hidden = target.hidden(tokens)[0, len(prompt) - 1 : -1].clone()
    return {"hidden": hidden, "logsumexp": target.logits(hidden).logsumexp(-1)}


def alpha_cost(logits: Tensor, tokens: Tensor) -> Tensor:
    """What acceptance a draft loses, [n], that agrees with all that was kept, the k tokens' and
    the tail's probability, and shares the tail evenly, as nothing kept tells it better:
    Σ over the tail of max(0, p − tail / (V − k)). Never more than the tail's mass.
    """
    p = logits.softmax(-1).scatter(-1, tokens, 0)
    even = p.sum(-1, keepdim=True) / (logits.shape[-1] - tokens.shape[-1])
    return (p - even).clamp(min=0).sum(-1).float()
