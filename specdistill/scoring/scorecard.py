"""scorecard.json: the measured result of one target, one draft and one set of prompts.

The fields are the contract other programs read (schema `specdistill.scorecard/1`). A card is made
by `measure.score` and `engines.base.scorecard`; `contradictions` computes again from `per_prompt`
what it says in sum.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, with_config

from specdistill.errors import InputError
from specdistill.files import write_whole, writing
from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.card_rows import (
    Baseline,
    CategoryRow,
    Count,
    DecodedText,
    DraftingWay,
    Gamma,
    Interval,
    Measured,
    MeasuredPositive,
    ModelCard,
    PromptRow,
    Row,
    Strict,
    Temperature,
    known_facts,
    with_fixed_gamma,
)
from specdistill.scoring.load import Load

if TYPE_CHECKING:
    from specdistill_kernels import Lenience, Mode

SCHEMA = "specdistill.scorecard/1"
OWN_ENGINE = "specdistill"  # `provenance["engine"]` of our own decoder


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
    """The fastest setting, and what it is worth, see `Verdict`."""

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
    """`baseline` is plain decoding by temperature, none where it was not measured, so that the card
    tells no speedup; `rows` are the settings in sum, `per_prompt` what all of that is computed
    from. `example` is one answer token by token, where it was asked for.
    """

    target: ModelCard
    draft: ModelCard
    provenance: Annotated[dict[str, Any], AfterValidator(known_facts)]
    baseline: list[Baseline]
    rows: Annotated[list[Row], Field(min_length=1)]
    per_prompt: list[PromptRow]
    lossless: Lossless
    verdict: Verdict
    verification: Verification = Verification()
    by_category: list[CategoryRow] = field(default_factory=list)
    by_prompt_length: list[CategoryRow] = field(default_factory=list)
    example: DecodedText | None = None
    load: Load = field(default_factory=Load)
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
        the engine where it is not ours, that plain decoding was not measured, and what is unusual
        about verification and drafting.
        """
        engine = f"measured in {self.outside_engine}" if self.outside_engine else ""
        proof = "FAILED: not lossless" if self.failures else ""
        plain = "" if self.baseline else "without plain decoding"
        return ", ".join(filter(None, [proof, engine, plain, self.settings_label]))

    @property
    def drafting(self) -> DraftingWay:
        """How the draft proposed."""
        return self.rows[0].drafting if self.rows else "autoregressive"

    @property
    def settings_label(self) -> str:
        """What is unusual about verification and drafting; empty for the usual."""
        reaches = sorted({row.least_reach for row in self.rows})
        early = ""
        if reaches and reaches[0]:  # else some rows are as usual, and each says what it is
            early = f"γ at most, stops early (least reach {', '.join(f'{x:g}' for x in reaches)})"
        parallel = "parallel draft" if self.drafting == "parallel" else ""
        trained = self.provenance.get("trained_draft_tokens")
        if parallel and trained and any(row.num_draft_tokens > trained for row in self.rows):
            parallel += f" trained for γ up to {trained}"
        method = self.provenance.get("speculative_config", {}).get("method")
        proposer = f"proposed by {method}" if method else ""
        return ", ".join(filter(None, [self.verification.label, early, parallel, proposer]))

    def verdict_row(self) -> Row:
        """The row that the verdict names, at the speedup that it tells."""
        best = self.verdict.best
        for row in self.rows:
            if (row.temperature, row.num_draft_tokens) == (best.temperature, best.num_draft_tokens):
                interval = self.verdict.speedup_ci95
                if math.isnan(interval[0]) and math.isfinite(best.speedup):
                    interval = row.speedup_ci95  # an older card
                return replace(row, speedup=best.speedup, speedup_ci95=interval)
        raise InputError(
            f"the scorecard's verdict names T = {best.temperature:g}, γ = {best.num_draft_tokens}, "
            "and it has no such row; score the draft again"
        )

    @property
    def fixed_gamma(self) -> int:
        """For engines that propose the same number in every round: that of the fastest row which
        does so at the verdict's temperature. Where none does, the mean of the fastest.
        """
        rows = [row for row in self.rows if row.temperature == self.verdict.best.temperature]
        fastest = max(with_fixed_gamma(rows), key=lambda row: row.speedup)
        proposed = fastest.draft_steps if fastest.least_reach else fastest.num_draft_tokens
        return max(1, round(proposed))

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
        chosen = [row for row in rows if (row.temperature, row.num_draft_tokens) == best]
        return chosen if len(chosen) > 1 else []

    def document(self) -> dict[str, Any]:
        """As JSON can hold it: what could not be measured (NaN) is null."""
        raw = asdict(self)
        raw["verification"]["lossy"] = self.verification.lossy
        return dict(nullable(raw))

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
    """Raises `ValueError` for what is there twice, by more positions than were proposed, or without
    what it is computed from.
    """
    setting = ("temperature", "num_draft_tokens")
    for name, fields in (
        ("baseline", setting[:1]),
        ("rows", setting),
        ("per_prompt", (*setting, "prompt_id")),
        ("by_category", (*setting, "category")),
        ("by_prompt_length", (*setting, "category")),
    ):
        for key, times in Counter(map(attrgetter(*fields), getattr(card, name))).items():
            if times > 1:
                raise ValueError(f"{name} has {key} twice")
    if not card.baseline and not all(math.isnan(row.speedup) for row in card.rows):
        raise ValueError("its rows tell a speedup, and there is no plain decoding")
    if len({row.drafting for row in card.rows}) > 1:
        raise ValueError("some of its rows drafted in parallel, and some did not")
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


def nullable(value: Any) -> Any:
    """With null for every number in nested dictionaries and lists that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: nullable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nullable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(document: dict[str, Any], path: Path) -> None:
    """Raises `StorageError` where the file cannot be written; an older one then stays."""
    with writing(path, "free space or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document, indent=2) + "\n")
