"""Evidence of losslessness, as a scorecard keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, with_config

from specdistill.scoring.card_rows import Count, MeasuredShare, Share, Strict

LEAST_IDENTITY, LEAST_P_VALUE = 0.99, 1e-4  # at or below these, evidence of losslessness fails


def _explained(ties: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tie in ties:
        if not isinstance(tie.get("within_rounding"), bool):
            raise ValueError("each must say whether it is within_rounding")
    return ties


def _counted(identical: tuple[int, int]) -> tuple[int, int]:
    if identical[0] > identical[1]:
        raise ValueError("more are identical than were compared")
    return identical


Identical = Annotated[tuple[Count, Count], AfterValidator(_counted)]
Ties = Annotated[list[dict[str, Any]], AfterValidator(_explained)]


@with_config(Strict)
@dataclass(frozen=True)
class Float32:
    """What a pair that decodes in half precision does on a share of the prompts in float32: greedy
    texts, differences and identity as in `Lossless`; or why that is `missing`.
    """

    greedy_identical: Identical = (0, 0)
    ties: Ties = field(default_factory=list)
    identity_acceptance: MeasuredShare = math.nan
    missing: str = ""

    @property
    def failures(self) -> list[str]:
        """What speaks against losslessness, a clause each."""
        return _failures(self, LEAST_IDENTITY, " in float32")


@with_config(Strict)
@dataclass(frozen=True)
class Lossless:
    """Evidence that the draft changes nothing: greedy texts equal to plain decoding [equal,
    compared], where the others part and whether rounding decided it (`ties`), acceptance of the
    target as its own draft and the least that rounding explains, p-value of the tests of sampled
    tokens (NaN with lenience, where it is not to be had). All of it in `dtype`, which older cards
    do not tell. An outside engine's card has neither acceptance nor p-value.
    """

    greedy_identical: Identical
    ties: Ties
    identity_acceptance: MeasuredShare
    distribution_p_value: MeasuredShare
    dtype: str = ""
    least_identity_acceptance: Share = LEAST_IDENTITY
    float32: Float32 | None = None

    @property
    def failures(self) -> list[str]:
        """What speaks against it, a clause each."""
        reasons = _failures(self, self.least_identity_acceptance, "")
        if self.float32 is not None:
            reasons += self.float32.failures
        if self.distribution_p_value <= LEAST_P_VALUE:
            reasons.append(
                "sampled tokens do not follow the target's distribution "
                f"(p = {self.distribution_p_value:.2g})"
            )
        return reasons

    @property
    def holds(self) -> bool:
        """Whether all of the evidence is there and nothing speaks against it."""
        absent = math.isnan(self.identity_acceptance) or math.isnan(self.distribution_p_value)
        return not self.failures and not absent


def _failures(proof: Lossless | Float32, least_acceptance: float, where: str) -> list[str]:
    same, compared = proof.greedy_identical
    unexplained = compared - same - sum(bool(tie["within_rounding"]) for tie in proof.ties)
    reasons = []
    if unexplained > 0:
        reasons.append(
            f"{unexplained} of {compared} greedy texts differ from those of plain decoding{where}, "
            "and rounding does not explain it"
        )
    if (accepted := proof.identity_acceptance) <= least_acceptance:
        reasons.append(
            f"as its own draft the target accepts {accepted:.3f} of its own tokens{where}"
        )
    return reasons
