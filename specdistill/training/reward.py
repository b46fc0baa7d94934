"""A reward beside the divergence: of several samples of the draft to one prompt, those that are
worth more than the others become more probable, while the divergence keeps the draft near the
target.

The samples of a prompt are a group, and the advantage of one is its reward against the group's mean
in the group's standard deviation (GRPO, 2402.03300). The gradient is that of the clipped ratio
between the draft's probability of now and of when it sampled (PPO, 1707.06347), since samples are
trained on more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

import torch
from torch import Tensor

from specdistill import config as configuration
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import own_function
from specdistill.data.signal import read_states, token_log_probs
from specdistill.data.token_store import Example
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.training.losses import Positions
from specdistill_kernels import divergence_rows, fused_divergence

ACCEPTED_LENGTH = "accepted-length"
CLIP = 0.2  # how far the ratio may move before it has no more gradient


@dataclass
class Sample(Example):
    """The draft's own text: its reward, its advantage within its group, and the draft's
    log-probability of each of its tokens when it was sampled.
    """

    reward: float = 0.0
    advantage: float = 0.0
    log_probs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Credit:
    """Of N response tokens: the advantage of their sample, 0 for text that is no sample, and the
    log-probabilities as in `Sample`.
    """

    advantages: Tensor
    log_probs: Tensor


# Samples of a prompt, the draft's log-probabilities of their tokens, and the target's model, to
# their rewards.
Function = Callable[[Sequence[Example], Sequence[Tensor], LanguageModel], list[float]]


@dataclass(frozen=True)
class Reward:
    """What a configuration asks for, its function found."""

    name: str
    function: Function
    weight: float
    group: int

    def rewarded(
        self, samples: Sequence[Example], target: LanguageModel, alone: LanguageModel
    ) -> list[Sample]:
        """A group of samples of `alone`, the draft over the target's tokens, with their advantages.
        Raises `InputError` for a reward that is no number.
        """
        log_probs = [_log_probs(alone, sample) for sample in samples]
        rewards = self.function(samples, log_probs, target)
        if len(rewards) != len(samples) or not all(map(math.isfinite, rewards)):
            raise InputError(
                f"the reward {self.name!r} gave {rewards} for the {len(samples)} samples of prompt "
                f"{samples[0].id!r}; it must give a finite number for each. Mend it and resume"
            )
        mean, spread = fmean(rewards), pstdev(rewards)
        advantages = [(r - mean) / spread if spread else 0.0 for r in rewards]
        return [
            Sample(**vars(s), reward=r, advantage=a, log_probs=q.tolist())
            for s, r, a, q in zip(samples, rewards, advantages, log_probs, strict=True)
        ]


def configured_reward(config: configuration.DistillConfig) -> Reward | None:
    """The reward of a configuration; None where there is none, or of no weight. Raises `InputError`
    for a function that cannot be had.
    """
    asked = config.reward
    if asked is None:
        return None
    name = asked.function
    function = accepted_length if name == ACCEPTED_LENGTH else _of_texts(name)
    return Reward(name, function, asked.weight, asked.group) if asked.weight else None


def accepted_length(
    samples: Sequence[Example], log_probs: Sequence[Tensor], target: LanguageModel
) -> list[float]:
    """How many tokens a round would accept that proposed the sample, expected over the draws of
    verification: Σ over its tokens of Π min(1, p/q) up to each (2211.17192). That it depends on q
    itself plays no part in the gradient, as with any reward.
    """
    return [
        (_log_probs(target, sample) - q).clamp(max=0).cumsum(0).exp().sum().item()
        for sample, q in zip(samples, log_probs, strict=True)
    ]


def credit_of(examples: Sequence[Example], device: torch.device) -> Credit | None:
    """Of a batch's response tokens, example after example; None where no example is a sample."""
    if not any(isinstance(example, Sample) for example in examples):
        return None
    advantages: list[float] = []
    log_probs: list[float] = []
    for e in examples:
        number = len(e.response_tokens)
        advantages += [e.advantage if isinstance(e, Sample) else 0.0] * number
        log_probs += e.log_probs if isinstance(e, Sample) else [0.0] * number
    return Credit(torch.tensor(advantages, device=device), torch.tensor(log_probs, device=device))


def mean_reward(groups: Sequence[Sequence[Example]]) -> dict[str, float]:
    """The mean over an update's samples, for the metrics; nothing where it has none."""
    rewards = [e.reward for group in groups for e in group if isinstance(e, Sample)]
    return {"reward": fmean(rewards)} if rewards else {}


def policy_loss(at: Positions, credit: Credit) -> Tensor:
    """−Σ over tokens of min(r A, clip(r) A) with r = q / q_sampled, differentiable in the draft's
    states and head. With r = 1 its gradient is −Σ A ∇ log q.

    The gradient is that of ce with weights, so a first pass finds r and a second the rest.
    """
    arguments = {**at.arguments(1.0), "target": None, "loss": "ce"}
    ratio = (-divergence_rows(**arguments) - credit.log_probs).exp()
    gain = ratio * credit.advantages
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * credit.advantages
    linear = fused_divergence(**arguments, weights=torch.where(gain <= clipped, gain, 0))
    return linear + (-torch.minimum(gain, clipped).sum() - linear).detach()


def credit_at(credit: Credit | None, positions: slice) -> Credit | None:
    """Of some of the N tokens."""
    if credit is None:
        return None
    return Credit(credit.advantages[positions], credit.log_probs[positions])


def _log_probs(model: LanguageModel, sample: Example) -> Tensor:
    """log-probabilities [n] of a sample's tokens, in float64."""
    states = read_states(model, sample.prompt_tokens, sample.response_tokens)
    return token_log_probs(model, states, sample.response_tokens).double().cpu()


def _of_texts(name: str) -> Function:
    """A function module:function of the user's, called with the prompt, see `Prompt`, whose one
    message is the text that the models read, and the list of the samples' texts.
    """
    called = own_function(name, "reward", f"{ACCEPTED_LENGTH} is there")

    def function(
        samples: Sequence[Example], log_probs: Sequence[Tensor], target: LanguageModel
    ) -> list[float]:
        def text(tokens: list[int]) -> str:
            return str(target.tokenizer.decode(tokens, skip_special_tokens=True))

        first = samples[0]
        asked = ({"role": "user", "content": text(first.prompt_tokens)},)
        return called(
            Prompt(first.id, asked, first.category), [text(s.response_tokens) for s in samples]
        )

    return function
