"""What a draft is trained for: a weighted sum of losses by name.

Two kinds. Those of single positions live in `specdistill_kernels` (`divergences/reference.py` has
their formulas), which goes from hidden states to a loss and its gradients by chunks of rows. Those
of whole blocks of proposals are in `BLOCK_LOSSES` here. Adding one is one function and one entry,
in the table of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdistill.config import DistillConfig
from specdistill.errors import InputError
from specdistill_kernels import Head, TargetStates, TargetTopK, divergence_rows, fused_divergence
from specdistill_kernels.divergences.reference import LOSSES as POSITION_LOSSES
from specdistill_kernels.divergences.reference import mixture

# Acceptance itself, so taken at the temperature the draft will decode at. The others are taken at
# the distillation temperature, ce at 1.
ACCEPTANCE = ("tvd", "lk_alpha", "lk_hybrid", "e2e_tv")

Target = TargetStates | TargetTopK


@dataclass(frozen=True)
class Objective:
    """Weights of losses by name, and their settings; made by `objective`. num_draft_tokens is the
    block of e2e_tv; options are beta, skew and eta where they were given.
    """

    weights: Mapping[str, float]
    temperature: float = 1.0
    decoding_temperature: float = 1.0
    num_draft_tokens: int | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    def by_temperature(self) -> dict[float, dict[str, float]]:
        """The losses of single positions that one pass over the head can share."""
        groups: dict[float, dict[str, float]] = {}
        for name, weight in self.weights.items():
            if name not in BLOCK_LOSSES and name != "ce":
                at = self.decoding_temperature if name in ACCEPTANCE else self.temperature
                groups.setdefault(at, {})[name] = weight
        if "ce" in self.weights:  # it has no temperature, and joins whichever is there
            groups.setdefault(next(iter(groups), 1.0), {})["ce"] = self.weights["ce"]
        return groups


def objective(
    loss: Mapping[str, float],
    *,
    temperature: float = 1.0,
    decoding_temperature: float = 1.0,
    num_draft_tokens: int | None = None,
    beta: float | None = None,
    skew: float | None = None,
    eta: float | None = None,
) -> Objective:
    """Check what was asked for. Raises `InputError` for an unknown loss, a bad weight, and a
    setting that no part of the loss reads.
    """
    if not loss:
        raise InputError("the loss is empty; give for instance {fkl: 1.0}")
    names = (*POSITION_LOSSES, *BLOCK_LOSSES)
    for name, weight in loss.items():
        if name not in names:
            raise InputError(f"unknown loss {name!r}; choose from {', '.join(names)}")
        if not 0 < weight < float("inf"):
            raise InputError(f"the weight of loss {name!r} must be above 0; got {weight}")
    scaled = [n for n in loss if n not in ACCEPTANCE and n != "ce"]
    accepting = [n for n in loss if n in ACCEPTANCE]
    if temperature != 1 and not scaled:
        raise InputError(
            f"temperature: {temperature} has no effect on the loss {', '.join(loss)}: it belongs "
            "to the KL family; overlap losses take decoding_temperature"
        )
    if decoding_temperature != 1 and not accepting:
        raise InputError(
            f"decoding_temperature: {decoding_temperature} has no effect on the loss "
            f"{', '.join(loss)}: it belongs to {', '.join(ACCEPTANCE)}"
        )
    if (num_draft_tokens is None) != ("e2e_tv" not in loss):
        raise InputError(
            "num_draft_tokens, the block of the loss e2e_tv, must be given with that loss and with "
            f"no other; got {num_draft_tokens} and {', '.join(loss)}"
        )
    options = {"beta": beta, "skew": skew, "eta": eta}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        mixture({n: w for n, w in loss.items() if n not in BLOCK_LOSSES} or "tvd", **given)
    except ValueError as error:
        raise InputError(str(error)) from None
    return Objective(dict(loss), temperature, decoding_temperature, num_draft_tokens, given)


def configured_objective(config: DistillConfig) -> Objective:
    """The loss a configuration asks for. Raises `InputError`."""
    num_draft_tokens = config.num_draft_tokens
    if config.parallel is not None and "e2e_tv" in config.loss:
        num_draft_tokens = config.parallel.num_draft_tokens
    return objective(
        config.loss,
        temperature=config.temperature,
        decoding_temperature=config.decoding_temperature,
        num_draft_tokens=num_draft_tokens,
        beta=config.beta,
        skew=config.skew,
        eta=config.eta,
    )


@dataclass(frozen=True)
class Positions:
    """N response positions, answer after answer: the draft's final hidden states [N, d] with its
    head, the target at a temperature or None for ce alone, the token that follows [N], and how many
    of the positions belong to each answer, or to each block of a parallel draft. draft_vocab [Vd]
    and weights [N] as in `fused_divergence`; no loss of whole blocks has weights.
    """

    states: Tensor
    head: Head
    target: Callable[[float], Target | None]
    labels: Tensor
    lengths: Tensor
    draft_vocab: Tensor | None = None
    chunk: int = 1024
    weights: Tensor | None = None

    def arguments(self, temperature: float) -> dict[str, Any]:
        """As `fused_divergence` and `divergence_rows` take them."""
        return {
            "hidden": self.states,
            "head": self.head,
            "target": self.target(temperature),
            "temperature": temperature,
            "labels": self.labels,
            "draft_vocab": self.draft_vocab,
            "chunk": self.chunk,
        }


def total_loss(at: Positions, objective: Objective) -> Tensor:
    """The sum over N positions, differentiable in the draft's states and head."""
    total = at.states.new_zeros((), dtype=torch.promote_types(at.states.dtype, torch.float32))
    for temperature, weights in objective.by_temperature().items():
        belongs = {"beta": {"jsd"}, "skew": {"skew_kl", "skew_rkl"}, "eta": {"lk_hybrid"}}
        arguments = at.arguments(temperature) | {"loss": weights}
        arguments |= {n: v for n, v in objective.options.items() if belongs[n] & weights.keys()}
        total = total + fused_divergence(**arguments, weights=at.weights)
    for name, weight in objective.weights.items():
        if name in BLOCK_LOSSES:
            total = total + weight * BLOCK_LOSSES[name](at, objective)
    return total


def e2e_tv(at: Positions, objective: Objective) -> Tensor:
    """Σ over blocks of γ positions of m − Σ_j Π_{i≤j} α_i, m ≤ γ the block's length: m times one
    minus the expected accepted share of the block (2606.12370), so that the mean over tokens weighs
    blocks by their length. Answers are cut into blocks from their start; a block of a parallel
    draft is one.

    α_i = Σ min(p_i, q_i) along the given text: exact where its tokens follow min(p, q)/α, an
    estimate on other text. No gradient flows through the choice of the text. With γ = 1 it is tvd.

    Its gradient is that of tvd with weights −∂/∂α, so a first pass finds the α, a second the rest.
    """
    assert objective.num_draft_tokens is not None
    arguments = at.arguments(objective.decoding_temperature) | {"loss": "tvd"}
    alpha = (1 - divergence_rows(**arguments)).requires_grad_()
    with torch.enable_grad():
        value = (1 - survival(alpha, at.lengths, objective.num_draft_tokens)).sum()
        (slope,) = torch.autograd.grad(value, alpha)
    linear = fused_divergence(**arguments, weights=-slope)
    return linear + (value - linear).detach()


BLOCK_LOSSES: dict[str, Callable[[Positions, Objective], Tensor]] = {"e2e_tv": e2e_tv}


def survival(alpha: Tensor, lengths: Tensor, num_draft_tokens: int) -> Tensor:
    """Π α over a block's positions up to each, [N], for blocks of `num_draft_tokens` cut from
    the start of answers of `lengths` positions.
    """
    blocks = -(-lengths // num_draft_tokens)
    answer = torch.repeat_interleave(torch.arange(len(lengths), device=alpha.device), lengths)
    place = torch.arange(len(alpha), device=alpha.device) - (lengths.cumsum(0) - lengths)[answer]
    block = (blocks.cumsum(0) - blocks)[answer] + place // num_draft_tokens
    grid = alpha.new_ones(int(blocks.sum()), num_draft_tokens)
    grid = grid.index_put((block, place % num_draft_tokens), alpha)
    return grid.cumprod(1)[block, place % num_draft_tokens]
