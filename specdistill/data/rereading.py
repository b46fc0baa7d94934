"""Whether another engine's word on the target is the target's own: answers are read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdistill.data.signal import States, TopK, read_states
from specdistill.data.token_store import Example
from specdistill.errors import DecodingError
from specdistill.models import LanguageModel

ANSWERS = 4  # that are read again
LARGEST_DISTANCE = 0.1  # mean total variation; kernels in half precision are about 0.01 apart


@dataclass
class Rereading:
    """The first `ANSWERS` answers by our own pass, of the target that `load` gives.

    Compared are probabilities at temperature 1: of all tokens where states are kept, else of the
    kept ones and the rest as one outcome. Logits are compared as log-probabilities.
    """

    load: Callable[[], LanguageModel]
    engine: str
    answers: int = 0
    tokens: int = 0
    largest: float = 0.0
    apart: float = 0.0  # sums over tokens
    agreed: int = 0
    target: LanguageModel | None = field(default=None, repr=False)

    @property
    def figures(self) -> dict[str, Any] | None:
        if not self.answers:
            return None
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "largest_logit_difference": self.largest,
            "total_variation": self.apart / self.tokens,
            "top_1_agreement": self.agreed / self.tokens,
        }

    @property
    def line(self) -> str:
        if not self.tokens:
            return ""
        return (
            f"{self.answers} answers of {self.engine} read again by our own pass: total variation "
            f"{self.apart / self.tokens:.4f}, top-1 agreement {self.agreed / self.tokens:.1%}, "
            f"largest difference of a logit {self.largest:.2f}"
        )

    def see(self, answer: Example) -> None:
        """Read an answer again, if it is one of the first. Raises `DecodingError` where the engine
        decodes another target, by all that were read so far.
        """
        if self.answers == ANSWERS or answer.signal is None:
            return
        self.target = self.target or self.load()
        ours = read_states(self.target, answer.prompt_tokens, answer.response_tokens)
        self._compare(self.target.logits(ours.hidden).log_softmax(-1), answer.signal)
        self.answers += 1
        if self.answers == ANSWERS:
            self.target = None  # its memory is free again
        if not self.apart / self.tokens <= LARGEST_DISTANCE:  # NaN, too
            raise DecodingError(
                f"{self.line}; at most {LARGEST_DISTANCE} of total variation is allowed: check "
                "that the engine serves this target, as it is, without adapters, other templates "
                "or a quantisation that --target does not name; on a GPU try also --engine-options "
                """'{"enforce_eager": true}'"""
            )

    def _compare(self, ours: Tensor, signal: States | TopK) -> None:
        if isinstance(signal, TopK):
            tokens = signal.tokens.long()
            theirs, log_tail = signal.log_probs.float(), signal.log_tail[:, None]
            rest = ours.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
            top = tokens.gather(-1, theirs.argmax(-1, keepdim=True))[:, 0]
            mine = torch.cat([ours.gather(-1, tokens), rest], -1)
            other = torch.cat([theirs, log_tail], -1)
        else:
            assert self.target is not None
            other, mine = self.target.logits(signal.hidden.cpu()).log_softmax(-1), ours
            top = other.argmax(-1)
        self.tokens += len(ours)
        self.agreed += int((top == ours.argmax(-1)).sum())
        self.apart += (mine.exp() - other.exp()).abs().sum().item() / 2
        self.largest = max(self.largest, (mine - other).abs().max().item())
