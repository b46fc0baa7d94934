"""What is learnt of the target at a response position, and kept by name: "states", see `States`;
"top-k:64", see `TopK`; "none".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdistill.errors import InputError
from specdistill.limits import shown
from specdistill.models import LanguageModel
from specdistill_kernels import TargetTopK, keep_top_k

STATES, NONE = "states", "none"
LOGIT_ROWS = 512  # of logits that are held at a time


@dataclass(frozen=True)
class States:
    """The target's final hidden states [n, d], from which its head makes all logits again, and
    their logsumexp [n] where it is known. A live pass may give the states of inner layers, too.
    """

    hidden: Tensor
    logsumexp: Tensor | None = None
    inner: Mapping[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept."""
        known = {} if self.logsumexp is None else {"logsumexp": self.logsumexp}
        return {"hidden": self.hidden, **known}


@dataclass(frozen=True)
class TopK:
    """The target's k most probable tokens [n, k], their log-probabilities [n, k] and the log of the
    mass of all others [n].
    """

    tokens: Tensor
    log_probs: Tensor
    log_tail: Tensor

    @classmethod
    def of(cls, top: TargetTopK) -> TopK:
        return cls(top.tokens.int(), top.log_probs.half(), top.log_tail.float())

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept."""
        return dict(vars(self))


Signal = States | TopK


def from_tensors(tensors: Mapping[str, Tensor]) -> Signal:
    """What `tensors` gave. Raises `ValueError` for other names."""
    names = {"hidden", "logsumexp"}, {"tokens", "log_probs", "log_tail"}
    if {*tensors} == names[0]:
        return States(tensors["hidden"], tensors["logsumexp"])
    if {*tensors} == names[1]:
        return TopK(**tensors)
    raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")


def positions_of(signal: Signal, positions: slice | Tensor) -> Signal:
    """The signal of some of the n positions."""
    parts = {name: tensor[positions] for name, tensor in signal.tensors().items()}
    if isinstance(signal, TopK):
        return TopK(**parts)
    inner = {layer: states[positions] for layer, states in signal.inner.items()}
    return States(parts["hidden"], parts.get("logsumexp"), inner)


def joined(signals: Sequence[Signal], device: torch.device | None = None) -> Signal:
    """One kept signal after the other, all of one kind."""
    parts = [signal.tensors() for signal in signals]
    return from_tensors({n: torch.cat([p[n] for p in parts]).to(device) for n in parts[0]})


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


def keep(target: LanguageModel, states: States, signal: str) -> tuple[Signal, float]:
    """What is kept of n positions, and the sum of their `alpha_cost`."""
    k = kept_tokens(signal)
    if k is None:
        return states, 0.0
    parts, cost = [], 0.0
    for rows in states.hidden.split(LOGIT_ROWS):
        logits = target.logits(rows)
        top = keep_top_k(logits, k)
        parts.append(TopK.of(top))
        cost += alpha_cost(logits, top.tokens).sum().item()
    whole = joined(parts)
    assert isinstance(whole, TopK)
    return whole, cost


def logsumexps(target: LanguageModel, hidden: Tensor, chunk: int = LOGIT_ROWS) -> Tensor:
    """Of the logits [N, V] of states [N, d], [N]; `chunk` rows of them are held at a time."""
    return torch.cat([target.logits(rows).logsumexp(-1) for rows in hidden.split(chunk)])


def token_log_probs(model: LanguageModel, states: States, tokens: Sequence[int] | Tensor) -> Tensor:
    """log p of n tokens, [n], from the states of the positions that predict them: only these rows
    of the head are multiplied.
    """
    hidden = states.hidden
    ids = torch.as_tensor(tokens, device=hidden.device)
    kind = torch.promote_types(model.dtype, torch.float32)
    logits = (hidden.to(kind) * model.head.weight[ids].to(kind)).sum(-1)
    if model.head.bias is not None:
        logits = logits + model.head.bias[ids]
    assert states.logsumexp is not None
    return model.scale_logits(logits) - states.logsumexp


@torch.inference_mode()
def read_states(target: LanguageModel, prompt: list[int], response: list[int]) -> States:
    """The target's final hidden states [n, d] and logsumexp [n] over n response tokens that another
    model wrote, by one pass.
    """
    tokens = torch.tensor([prompt + response], device=target.device)
    hidden = target.hidden(tokens)[0, len(prompt) - 1 : -1].clone()
    return States(hidden, logsumexps(target, hidden))


def alpha_cost(logits: Tensor, tokens: Tensor) -> Tensor:
    """What acceptance a draft loses, [n], that agrees with all that was kept, the k tokens' and
    the tail's probability, and shares the tail evenly, as nothing kept tells it better:
    Σ over the tail of max(0, p − tail / (V − k)). Never more than the tail's mass.
    """
    p = logits.softmax(-1).scatter(-1, tokens, 0)
    even = p.sum(-1, keepdim=True) / (logits.shape[-1] - tokens.shape[-1])
    return (p - even).clamp(min=0).sum(-1).float()
