"""scorecard.json: the measured result of one target, one draft and one set of prompts.

The fields are the contract other programs read (schema `specdistill.scorecard/1`). A card is made
by `measure.score` and `engines.measure`; `trust` computes again from `per_prompt` what it says in
sum. Two cards cannot be added.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from typing_extensions import TypedDict

from specdistill.errors import InputError, StorageError
from specdistill.files import write_whole
from specdistill.limits import MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from specdistill_kernels import Lenience, Mode

SCHEMA = "specdistill.scorecard/1"
OWN_ENGINE = "specdistill"  # `provenance["engine"]` of our own decoder
LEAST_IDENTITY, LEAST_P_VALUE = 0.99, 1e-4  # at or below these, evidence of losslessness fails

LEAST_VERIFY_RATIO = 0.95  # but for the clock's noise it is at least 1
PLAIN_SLOWED = (
    "a verify pass does all that a plain step does, and took less time (v < 0.95): plain decoding "
    "was slowed down, or is not at its best here, so that there is no speedup to tell"
)


# What a field may hold, which `Scorecard.read` insists on; nothing checks it while a card is made.


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
Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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
    draft_origin: dict[str, Any] | None
    turns: str
    trained_prompts: TrainedPrompts | None
    measured_again: Temperature | None
    steal: Share | None
    stalls: Share


def _known_facts(facts: dict[str, Any]) -> dict[str, Any]:
    return dict(_facts().validate_python(facts))


@cache
def _facts() -> TypeAdapter[Provenance]:
    return TypeAdapter(Provenance)


@with_config(Strict)
@dataclass(frozen=True)
class ModelCard:
    """One model of the pair. `weight_bytes` are the bytes read for one token: an embedding that is
    only looked up does not count, a head that is multiplied does.
    """

    name: str
    parameters: Natural
    weight_bytes: Natural
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
    is not like what it did.
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

    @property
    def draft_steps(self) -> float:
        """Of a round: γ, or fewer where drafting stops early."""
        return self.proposed / self.rounds if self.least_reach else self.num_draft_tokens

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
    `prompt_tokens`.
    """

    prompt_id: str
    temperature: Temperature
    num_draft_tokens: Gamma
    emitted: Natural
    rounds: Natural
    seconds: Positive
    baseline_seconds: Positive
    baseline_emitted: Natural
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
        found = _unexplained(self.greedy_identical, self.ties, " in float32")
        if self.identity_acceptance <= LEAST_IDENTITY:
            found.append(_rejected(self.identity_acceptance, " in float32"))
        return found


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
        found = _unexplained(self.greedy_identical, self.ties, "")
        if self.identity_acceptance <= self.least_identity_acceptance:
            found.append(_rejected(self.identity_acceptance, ""))
        if self.float32 is not None:
            found += self.float32.failures
        if self.distribution_p_value <= LEAST_P_VALUE:
            found.append(
                "sampled tokens do not follow the target's distribution "
                f"(p = {self.distribution_p_value:.2g})"
            )
        return found

    @property
    def holds(self) -> bool:
        """Whether all of the evidence is there and nothing speaks against it."""
        absent = math.isnan(self.identity_acceptance) or math.isnan(self.distribution_p_value)
        return not self.failures and not absent


def _unexplained(identical: tuple[int, int], ties: list[dict[str, Any]], where: str) -> list[str]:
    same, compared = identical
    count = compared - same - sum(bool(tie["within_rounding"]) for tie in ties)
    if count <= 0:
        return []
    return [
        f"{count} of {compared} greedy texts differ from those of plain decoding{where}, and "
        "rounding does not explain it"
    ]


def _rejected(acceptance: float, where: str) -> str:
    return f"as its own draft the target accepts {acceptance:.3f} of its own tokens{where}"


@with_config(Strict)
@dataclass(frozen=True)
class Verification:
    """How proposals were verified: singly ("token") or as a whole ("block"), both exact; or singly
    with a lenience such as "lin:0.5", which is LOSSY: the text no longer follows the target.
    """

    mode: Literal["token", "block"] = "token"
    lenience: str | None = None

    @property
    def lossy(self) -> bool:
        return self.lenience is not None

    @classmethod
    def of(cls, mode: Mode, lenience: Lenience | None) -> Verification:
        return cls(mode, None if lenience is None else f"{lenience.kind}:{lenience.epsilon:g}")

    @property
    def label(self) -> str:
        """What every table, picture and report made from the card says; empty for the usual."""
        if self.lossy:
            return f"LOSSY, lenience {self.lenience}"
        return "" if self.mode == "token" else f"{self.mode} verification"


@with_config(Strict)
@dataclass(frozen=True)
class Best:
    temperature: Temperature
    num_draft_tokens: Gamma
    speedup: MeasuredPositive


@with_config(Strict)
@dataclass(frozen=True)
class Verdict:
    """Does the draft pay? `break_even_acceptance` is the acceptance rate, and
    `break_even_cost_ratio` the cost of a draft step, at which the best γ would be as fast as plain
    decoding on this machine, all else being as measured; the latter is negative where no draft is
    cheap enough, and NaN in older cards.

    The speedup and its interval are those of the best γ on prompts that had no say in choosing it,
    see `choice`, which halves of `chosen_on` and `judged_on` prompts tell: 0 where there was
    nothing to choose, and in older cards, which have no interval here. Both are NaN where the
    figures cannot be trusted.
    """

    pays: bool
    best: Best
    break_even_acceptance: Measured
    reason: str
    break_even_cost_ratio: Measured = math.nan
    speedup_ci95: Interval = (math.nan, math.nan)
    chosen_on: Count = 0
    judged_on: Count = 0


@with_config(Strict)
@dataclass(frozen=True)
class Scorecard:
    target: ModelCard
    draft: ModelCard
    provenance: Annotated[dict[str, Any], AfterValidator(_known_facts)]
    baseline: Annotated[list[Baseline], Field(min_length=1)]
    rows: Annotated[list[Row], Field(min_length=1)]
    per_prompt: list[PromptRow]
    lossless: Lossless
    verdict: Verdict
    verification: Verification = Verification()
    by_category: list[CategoryRow] = field(default_factory=list)
    by_prompt_length: list[CategoryRow] = field(default_factory=list)
    example: DecodedText | None = None
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        """Whatever the verdict was: without the proof of losslessness it is FAILED."""
        if self.failures:
            object.__setattr__(self, "verdict", _failed(self.verdict, self.failures))

    @property
    def failures(self) -> list[str]:
        """Why the output is not shown to be lossless, a clause each; what the verification gives
        away by its own word (LOSSY) is no failure.
        """
        missing = []
        if not self.outside_engine and math.isnan(self.lossless.identity_acceptance):
            missing.append("the target was not tried as its own draft")
        exact = not self.outside_engine and not self.verification.lossy
        if exact and math.isnan(self.lossless.distribution_p_value):
            missing.append("the distribution of sampled tokens was not tested")
        return [*self.lossless.failures, *missing]

    @property
    def outside_engine(self) -> str:
        """The engine of another project that was measured, such as "vllm 0.32.0"; empty for ours.
        Its card holds what it tells and no more: the rest is NaN.
        """
        engine = self.provenance.get("engine", OWN_ENGINE)
        if engine == OWN_ENGINE:
            return ""
        return f"{engine} {self.provenance.get('versions', {}).get(engine, '')}".strip()

    @property
    def label(self) -> str:
        """What every table, picture and report made from the card says: that its evidence failed,
        the engine where it is not ours, and what is unusual about verification and drafting.
        """
        engine = f"measured in {self.outside_engine}" if self.outside_engine else ""
        proof = "FAILED: not lossless" if self.failures else ""
        least = self.rows[0].least_reach
        early = f"γ at most, stops early (least reach {least:g})" if least else ""
        return ", ".join(filter(None, [proof, engine, self.verification.label, early]))

    def best_row(self, temperature: float) -> Row:
        """The fastest row measured at `temperature`, with what it is worth on prompts that had no
        say in choosing it, see `choice.judged`.
        """
        rows = [row for row in self.rows if row.temperature == temperature]
        if not rows:
            had = sorted({row.temperature for row in self.rows})
            raise InputError(f"the scorecard has no row at temperature {temperature}; it has {had}")
        from specdistill.scoring.choice import judged  # SciPy, which not every reader needs

        fastest = max(rows, key=lambda row: row.speedup)
        return judged(fastest, [p for p in self.per_prompt if p.temperature == temperature])

    def slices(self, name: Literal["by_category", "by_prompt_length"]) -> list[CategoryRow]:
        """Those of the verdict's setting, if there are several: a single one is the whole. None
        where there is no speedup to tell.
        """
        if math.isnan(self.verdict.best.speedup):
            return []
        best = (self.verdict.best.temperature, self.verdict.best.num_draft_tokens)
        rows: list[CategoryRow] = getattr(self, name)
        found = [row for row in rows if (row.temperature, row.num_draft_tokens) == best]
        return found if len(found) > 1 else []

    def document(self) -> dict[str, Any]:
        """As JSON can hold it: what could not be measured (NaN) is null."""
        raw = asdict(self)
        raw["verification"]["lossy"] = self.verification.lossy
        return nullable(raw)

    def write(self, path: str | Path) -> None:
        """Raises `StorageError` where the file cannot be written; an older one then stays."""
        write_json(self.document(), Path(path))

    @classmethod
    def read(cls, path: Path) -> Scorecard:
        """Raises `InputError` for a missing file, another schema, or fields that do not fit."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"there is no scorecard {path}; `specdistill score ... --out {path}` writes one"
            ) from None
        except OSError as error:
            raise InputError(f"cannot read scorecard {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON ({error}); name a scorecard.json") from error
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            got = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(f"{path} has schema {got!r}; this version reads {SCHEMA!r}")
        try:
            _set_lossy(raw.get("verification"))
            card = _cards().validate_json(json.dumps(raw))
            _check_lists(card)
        except ValidationError as error:
            first, *more = error.errors(include_url=False)
            where = ".".join(map(str, first["loc"]))
            also = f" (and {len(more)} more)" if more else ""
            raise InputError(
                f"{path} is not a complete scorecard: {where}: {first['msg']}{also}; score the "
                "pair again"
            ) from error
        except ValueError as error:
            raise InputError(f"{path} is not a complete scorecard: {error}") from error
        return card


@cache
def _cards() -> TypeAdapter[Scorecard]:
    return TypeAdapter(Scorecard)


def _set_lossy(verification: Any) -> None:
    """What the lenience says is no field of its own. Raises `ValueError` where they disagree."""
    if not isinstance(verification, dict):
        return
    lossy = verification.pop("lossy", None)
    if lossy is not None and lossy is not (verification.get("lenience") is not None):
        raise ValueError(f"verification says lossy: {lossy} beside its lenience")


def _check_lists(card: Scorecard) -> None:
    """Raises `ValueError` for what is there twice, or by more positions than were proposed."""
    lists: list[tuple[str, Iterable[Hashable]]] = [
        ("baseline", [base.temperature for base in card.baseline]),
        ("rows", [(row.temperature, row.num_draft_tokens) for row in card.rows]),
        (
            "per_prompt",
            [(row.temperature, row.num_draft_tokens, row.prompt_id) for row in card.per_prompt],
        ),
    ]
    for name, part in (
        ("by_category", card.by_category),
        ("by_prompt_length", card.by_prompt_length),
    ):
        lists.append((name, [(r.temperature, r.num_draft_tokens, r.category) for r in part]))
    for name, keys in lists:
        seen = set()
        for key in keys:
            if key in seen:
                raise ValueError(f"{name} has {key} twice")
            seen.add(key)
    if len({row.least_reach for row in card.rows}) > 1:
        raise ValueError("its rows have several values of least_reach")
    for row in card.rows:
        sizes = len(row.acceptance_by_position), len(row.survival_by_position)
        if sizes[0] != sizes[1] or sizes[0] > row.num_draft_tokens:
            raise ValueError(
                f"a row of γ = {row.num_draft_tokens} has {sizes[0]} rates of acceptance by "
                f"position and {sizes[1]} of survival"
            )
    for proof in (card.lossless, card.lossless.float32):
        if (
            proof is not None
            and len(proof.ties) > proof.greedy_identical[1] - proof.greedy_identical[0]
        ):
            raise ValueError("there are more ties than greedy texts that differ")


def _failed(verdict: Verdict, failures: list[str]) -> Verdict:
    """In place of a verdict on the speed of a text that is not the target's."""
    best = verdict.best
    reason = f"FAILED, not lossless: {'; '.join(failures)}."
    if not math.isnan(best.speedup):
        reason += (
            f" That it took {best.speedup:.2f} times the speed of plain decoding at γ = "
            f"{best.num_draft_tokens}, temperature {best.temperature:g}, counts for nothing."
        )
    return replace(verdict, pays=False, reason=reason)


def nullable(document: dict[str, Any]) -> dict[str, Any]:
    """With null for every number that JSON cannot hold."""
    return dict(
        _map_leaves(
            document, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
        )
    )


def write_json(document: dict[str, Any], path: Path) -> None:
    """Raises `StorageError` where the file cannot be written; an older one then stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: _map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_leaves(item, change) for item in value]
    return change(value)
