"""What a scorecard is made of: models, plain decoding, rows by setting, by prompt and by category.

A field's type says what it may hold, which `Scorecard.read` insists on; nothing checks it while a
card is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict

from specdistill.limits import MAX_DRAFT_TOKENS

LEAST_VERIFY_RATIO = 0.95  # but for the clock's noise it is at least 1
PLAIN_SLOWED = (
    "a verify pass does all that a plain step does, and took less time (v < 0.95): plain decoding "
    "was slowed down, or is not at its best here, so that there is no speedup to tell"
)


def _null_is_nan(value: Any, handler: ValidatorFunctionWrapHandler) -> float:
    return math.nan if value is None else float(handler(value))


Count = Annotated[int, Field(ge=0, le=2**53)]
Natural = Annotated[int, Field(ge=1, le=2**53)]
Gamma = Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)]
Temperature = Annotated[float, Field(ge=0, le=1e6)]
Number = Annotated[float, Field(gt=-1e15, lt=1e15)]
Positive = Annotated[float, Field(gt=0, lt=1e15)]
Share = Annotated[float, Field(ge=0, le=1.001)]  # older ones round to above 1
Measured = Annotated[Number, WrapValidator(_null_is_nan)]  # null where it could not be
MeasuredPositive = Annotated[Positive, WrapValidator(_null_is_nan)]
MeasuredShare = Annotated[Share, WrapValidator(_null_is_nan)]
Interval = tuple[MeasuredPositive, MeasuredPositive]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
DraftingWay = Literal["autoregressive", "parallel", "look-up"]
Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TrainedPrompts(TypedDict):
    """How many prompts the draft was trained on, a hash of them, and how many were `scored`."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]

    prompts: Natural
    sha256: Sha256
    scored: Count


class Provenance(TypedDict, total=False):
    """What is read of `Scorecard.provenance`, which may hold more."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)  # type: ignore[misc]

    device: str
    threads: Natural
    dtype: str
    versions: dict[str, str | None]
    git: str | None
    seed: Count
    date: str
    engine: str
    max_new_tokens: Natural
    prompts_sha256: str
    conversation_turns: Literal["last", "all"]
    draft_origin: dict[str, Any] | None
    turns: str
    trained_prompts: TrainedPrompts | None
    measured_again: Temperature | None
    trained_draft_tokens: Natural | None
    mask_token: Count | None
    speculative_config: dict[str, Any]
    engine_options: dict[str, Any]
    draft_sampling: str
    runner: str
    runners: list[dict[str, Any]]
    schedule: list[list[Count]]
    steal: Share | None
    stalls: Share


def known_facts(facts: dict[str, Any]) -> dict[str, Any]:
    return dict(_facts().validate_python(facts))


@cache
def _facts() -> TypeAdapter[Provenance]:
    return TypeAdapter(Provenance)


@with_config(Strict)
@dataclass(frozen=True)
class ModelCard:
    """One model of the pair. `weight_bytes` are the bytes read for one token: an embedding that is
    only looked up does not count, a head that is multiplied does. What proposes without weights of
    its own has none, and the hash of its settings.
    """

    name: str
    parameters: Count
    weight_bytes: Count
    dtype: str
    vocab_size: Natural
    sha256: Sha256


@with_config(Strict)
@dataclass(frozen=True)
class Baseline:
    """Plain decoding by the same engine at one temperature. `seconds` are `Row.seconds`' parts;
    older cards have none.
    """

    temperature: Temperature
    tokens_per_second: MeasuredPositive
    prompts: Natural
    tokens: Natural
    seconds_per_step: Number
    seconds: dict[str, Number] = field(default_factory=dict)


@with_config(Strict)
@dataclass(frozen=True)
class Row:
    """Speculative decoding at one temperature and one γ, over all prompts. The words are
    those of docs/guide/scorecard.md.

    Lists are indexed by draft position: `acceptance_by_position[i]` given that all earlier
    positions were accepted, `survival_by_position[i]` of all rounds, see `rows.survival`.
    `seconds` splits the measured time into the prompts' prefill, draft steps, verify passes (the
    target's forward), the verify function and the rest of a round, and the loop around it.

    With a `least_reach` above 0 (see `ModelDrafter`) γ is the most that is proposed. What follows
    from γ alone is then absent (`planned_speedup`) or by the mean number of proposals (`mbsu`), and
    survival is the share of all rounds: a row stops where it doubts, so what it did not propose
    is not like what it did. With `drafting` "parallel" a round takes one draft step, whatever γ,
    with "look-up" none: proposals come from the text itself, γ at most, often none at all.
    """

    temperature: Temperature
    num_draft_tokens: Gamma
    prompts: Natural
    rounds: Natural
    proposed: Count
    tested: Count
    accepted: Count
    emitted: Natural
    acceptance_rate: MeasuredShare
    acceptance_rate_expected: MeasuredShare
    acceptance_per_proposal: MeasuredShare
    acceptance_by_position: list[Share]
    survival_by_position: list[Share]
    block_efficiency: Positive
    tokens_per_second: MeasuredPositive
    speedup: MeasuredPositive
    speedup_ci95: Interval
    cost_ratio: Measured
    verify_ratio: Measured
    predicted_speedup: Measured
    planned_speedup: Measured
    mbsu: Positive
    seconds: dict[str, Number] = field(default_factory=dict)
    least_reach: Share = 0.0
    drafting: DraftingWay = "autoregressive"

    @property
    def draft_steps(self) -> float:
        """Of a round, see `draft_steps`."""
        mean = self.proposed / self.rounds
        return draft_steps(self.num_draft_tokens, mean, self.least_reach, self.drafting)

    @property
    def slowed(self) -> bool:
        """Whether a verify pass took less time than a plain step, though it does all of that and
        more: plain decoding was slowed down, and what looks like a speedup is none. Outside engines
        do not tell.
        """
        return self.verify_ratio < LEAST_VERIFY_RATIO


@with_config(Strict)
@dataclass(frozen=True)
class PromptRow:
    """One prompt in one setting; what the paired bootstrap resamples. `verifying_seconds` are those
    of its rounds without their draft steps, `stepping_seconds` those of its plain steps, neither
    with the prefill of the prompt. Older cards have None for these, `tested`, `accepted` and
    `prompt_tokens`. Where plain decoding was not measured, `baseline_seconds` is NaN and
    `baseline_emitted` 0.
    """

    prompt_id: str
    temperature: Temperature
    num_draft_tokens: Gamma
    emitted: Natural
    rounds: Natural
    seconds: Positive
    baseline_seconds: MeasuredPositive
    baseline_emitted: Count
    tested: Count | None = None
    accepted: Count | None = None
    verifying_seconds: Number | None = None
    stepping_seconds: Number | None = None
    category: str | None = None
    prompt_tokens: Natural | None = None


@with_config(Strict)
@dataclass(frozen=True)
class CategoryRow:
    """A `Row` in short, of the prompts of one category, or of one band of lengths such as "64–127
    tokens".
    """

    category: str
    temperature: Temperature
    num_draft_tokens: Gamma
    prompts: Natural
    tested: Count
    accepted: Count
    acceptance_rate: MeasuredShare
    block_efficiency: Positive
    speedup: MeasuredPositive
    speedup_ci95: Interval


Kind = Literal["accepted", "residual", "bonus"]


@with_config(Strict)
@dataclass(frozen=True)
class DecodedText:
    """One answer, token by token, and how each came about: an accepted proposal, the token drawn
    after a rejection, or the one after full acceptance. Kept only where the user wants: it is text
    of their workload.
    """

    prompt_id: str
    temperature: Temperature
    num_draft_tokens: Gamma
    pieces: list[tuple[str, Kind]]


def of_setting(
    per_prompt: Sequence[PromptRow], temperature: float, num_draft_tokens: int
) -> list[PromptRow]:
    """The rows of one temperature and one γ."""
    setting = (temperature, num_draft_tokens)
    return [row for row in per_prompt if (row.temperature, row.num_draft_tokens) == setting]


def with_fixed_gamma(rows: Sequence[Row]) -> list[Row]:
    """Those that do not stop early; all, where every row does."""
    return [row for row in rows if not row.least_reach] or list(rows)


def draft_steps(
    num_draft_tokens: int, mean_proposed: float, least_reach: float, drafting: DraftingWay
) -> float:
    """Of a round: γ, as many as were proposed where drafting stops early, one in parallel, none
    without a model.
    """
    if drafting != "autoregressive":
        return 1 if drafting == "parallel" else 0
    return mean_proposed if least_reach else num_draft_tokens


def setting_of(row: Row | CategoryRow) -> str:
    """The setting in a few words."""
    return f"T = {row.temperature:g}, γ = {row.num_draft_tokens}"
