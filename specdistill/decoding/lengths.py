"""How many tokens to propose: a rule that needs no training and changes no distribution."""

from __future__ import annotations

from dataclasses import dataclass

from specdistill.errors import InputError
from specdistill.limits import MAX_DRAFT_TOKENS


@dataclass(frozen=True)
class AdaptiveLength:
    """Chooses each row's number of proposals anew in each round, from that row's own past.

    The acceptance rate is estimated from what was tested in the row so far, older rounds counting
    `memory` less each round, beside a prior of `prior_tested` positions at `prior_rate`. The number
    proposed, 1 to `max_draft_tokens`, maximises the planned speedup (1 - α^{γ+1}) / ((1 - α)(γc +
    1)) of 2211.17192 (Theorem 3.8), where c, `cost_ratio`, is the measured time of a draft step
    over that of a plain target step. Deterministic, and independent of the rest of the batch.
    """

    cost_ratio: float
    max_draft_tokens: int = 8
    memory: float = 0.9
    prior_rate: float = 0.7
    prior_tested: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.cost_ratio < float("inf"):
            raise InputError(f"cost_ratio must be 0 or more; got {self.cost_ratio}")
        if not 1 <= self.max_draft_tokens <= MAX_DRAFT_TOKENS:
            raise InputError(
                f"max_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}; got {self.max_draft_tokens}"
            )
        if not (0 <= self.memory <= 1 and 0 < self.prior_rate < 1 and self.prior_tested > 0):
            raise InputError(
                "memory must be 0 to 1, prior_rate between 0 and 1 and prior_tested above 0; got "
                f"{self.memory}, {self.prior_rate} and {self.prior_tested}"
            )

    def choose(self, accepted: float, tested: float) -> int:
        """The number of proposals after `accepted` of `tested`, both already weighted."""
        rate = (self.prior_tested * self.prior_rate + accepted) / (self.prior_tested + tested)

        def planned(num: int) -> float:
            emitted = sum(rate**i for i in range(num + 1))
            return emitted / (num * self.cost_ratio + 1)

        return max(range(1, self.max_draft_tokens + 1), key=planned)
