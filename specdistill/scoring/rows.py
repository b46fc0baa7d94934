"""From what was decoded and timed to the rows of a scorecard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from statistics import median_low
from typing import TYPE_CHECKING

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import Detokenizer, Generation
from specdistill.decoding.records import Output
from specdistill.scoring.card_rows import (
    Baseline,
    DecodedText,
    DraftingWay,
    Kind,
    PromptRow,
    Row,
    draft_steps,
)
from specdistill.scoring.choice import Setting
from specdistill.scoring.statistics import planned_speedup, speedup_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_PARTS = ("draft", "target", "verify", "other")  # of a round
PARTS = ("prefill", *STEP_PARTS, "loop")
STALL = 3.0  # a step that took so many medians was held up by something else


@dataclass(frozen=True)
class Timed:
    """One prompt decoded once, and its wall time."""

    generation: Generation
    seconds: float


@dataclass(frozen=True)
class Counts:
    """One prompt decoded in one setting, by our engine or another: its answer, seconds, and the
    target's passes that emitted something (`rounds`; plain decoding has as many as tokens). By
    position in the round [γ], in how many rounds there was a proposal (`offered`), it was tested,
    it was accepted. `parts` split the seconds and `step_seconds` are those of the rounds after the
    first, where the engine lets us see them.
    """

    tokens: list[int]
    seconds: float
    rounds: int
    offered: list[int]
    tested: list[int]
    accepted: list[int]
    step_seconds: Sequence[float] = ()
    parts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def unmeasured(cls) -> Counts:
        """In place of plain decoding that was not measured."""
        return cls([], math.nan, 0, [], [], [])

    def seconds_without(self, *names: str) -> float | None:
        """Less these parts; None where no parts are known."""
        if not self.parts:
            return None
        return sum(spent for name, spent in self.parts.items() if name not in names)


@dataclass(frozen=True)
class Decoded:
    """One prompt in one setting by our engine. What was decoded several times, as plain decoding
    is, has the counts and the answer of the first and the mean of the times, without stalls.
    """

    counts: Counts
    output: Output
    draft_passes: int


def counted(runs: Mapping[Setting, Sequence[Decoded]]) -> dict[Setting, list[Counts]]:
    """The counts of every setting, by prompt."""
    return {setting: [each.counts for each in decoded] for setting, decoded in runs.items()}


def without_stalls(
    timed: Mapping[Setting, Sequence[Sequence[Timed]]],
) -> tuple[dict[Setting, list[Decoded]], float]:
    """The runs of every setting, and the share of the time that was left out of them as stalls.
    `timed` has for every prompt the times that it was decoded in the setting, one or more.

    The rounds of a run do the same work, so one that took `STALL` times as long as the median, of
    the run or, where that has fewer than three rounds, of the setting, was held up by something
    else: it counts as the median. So does the time of a prompt's prefill, and that between rounds,
    beside the prompt's other runs. Plain decoding and drafts are treated alike, so that neither
    gains by it.
    """
    usual = _usual_of_prompts(timed)
    by_setting: dict[Setting, list[Decoded]] = {}
    wall = 0.0
    for setting, prompts in timed.items():
        by_setting[setting] = []
        every = [step for repeats in prompts for run in repeats for step in _steps(run)]
        for i, repeats in enumerate(prompts):
            steps = [step for run in repeats for step in _steps(run)]
            parts = _steady(steps, steps if len(steps) >= 3 else every)
            for name in ("prefill", "loop"):
                parts[name] = sum(
                    usual[i][name] if spent > STALL * usual[i][name] else spent
                    for spent in (_once(run)[name] for run in repeats)
                )
            mean = {name: parts[name] / len(repeats) for name in PARTS}
            by_setting[setting].append(_decoded(repeats[0].generation, setting[1], mean))
            wall += sum(run.seconds for run in repeats) / len(repeats)
    spent = sum(each.counts.seconds for decoded in by_setting.values() for each in decoded)
    return by_setting, max(0.0, 1 - spent / wall) if wall > 0 else 0.0


def _decoded(generation: Generation, num: int, parts: Mapping[str, float]) -> Decoded:
    """Of at most `num` draft tokens a round."""
    (output,) = generation.outputs
    offered, tested, accepted = (
        [sum(getattr(r, name) > i for r in output.rounds) for i in range(num)]
        for name in ("proposed", "tested", "accepted")
    )
    seconds, rounds = sum(parts.values()), generation.rounds
    counts = Counts(output.tokens, seconds, rounds, offered, tested, accepted, parts=parts)
    return Decoded(counts, output, generation.draft_steps)


def _steps(run: Timed) -> list[dict[str, float]]:
    """Its rounds, without the prefill."""
    return [{name: step[name] for name in STEP_PARTS} for step in run.generation.round_seconds]


def _once(run: Timed) -> dict[str, float]:
    """What a run spends beside its rounds."""
    rounds = run.generation.round_seconds
    return {
        "prefill": sum(step["prefill"] for step in rounds),
        "loop": run.seconds - sum(sum(step.values()) for step in rounds),
    }


def _usual_of_prompts(
    timed: Mapping[Setting, Sequence[Sequence[Timed]]],
) -> list[dict[str, float]]:
    """By prompt, the median of `_once` over all its runs, in all settings."""
    by_prompt = zip(*timed.values(), strict=True)
    every = [[_once(run) for repeats in prompt for run in repeats] for prompt in by_prompt]
    names = ("prefill", "loop")
    return [{name: median_low([once[name] for once in some]) for name in names} for some in every]


def _steady(
    steps: Sequence[dict[str, float]], alike: Sequence[dict[str, float]]
) -> dict[str, float]:
    """The sums by part, with the medians of `alike` in place of stalled steps."""
    limit = STALL * median_low([sum(step.values()) for step in alike])
    usual = {name: median_low([step[name] for step in alike]) for name in STEP_PARTS}
    counted = [usual if sum(step.values()) > limit else step for step in steps]
    return {name: sum(step[name] for step in counted) for name in STEP_PARTS}


def baseline(temperature: float, plain: Sequence[Counts]) -> Baseline:
    """Plain decoding in sum."""
    seconds, steps = sum(c.seconds for c in plain), sum(c.rounds for c in plain)
    return Baseline(
        temperature=temperature,
        tokens_per_second=tokens_per_second(plain),
        prompts=len(plain),
        tokens=sum(len(c.tokens) for c in plain),
        seconds_per_step=seconds / steps,
        seconds=_by_part(plain),
    )


def by_prompt(
    setting: Setting,
    prompts: Sequence[EncodedPrompt],
    counts: Sequence[Counts],
    plain: Sequence[Counts],
) -> list[PromptRow]:
    """One setting, prompt by prompt."""
    temperature, num = setting
    return [
        PromptRow(
            prompt_id=prompt.id,
            temperature=temperature,
            num_draft_tokens=num,
            emitted=len(drafted.tokens),
            rounds=drafted.rounds,
            seconds=drafted.seconds,
            baseline_seconds=base.seconds,
            baseline_emitted=len(base.tokens),
            tested=sum(drafted.tested),
            accepted=sum(drafted.accepted),
            verifying_seconds=drafted.seconds_without("draft", "prefill"),
            stepping_seconds=base.seconds_without("prefill"),
            category=prompt.category,
            prompt_tokens=len(prompt.tokens),
        )
        for prompt, drafted, base in zip(prompts, counts, plain, strict=True)
    ]


def example(
    tokenizer: PreTrainedTokenizerBase, prompt_id: str, setting: tuple[float, int], output: Output
) -> DecodedText:
    """One answer with the origin of every token. A character of several tokens counts to the last
    of them; the others are empty.
    """
    kinds: list[Kind] = []
    for r in output.rounds:
        rest = len(r.tokens) - r.accepted  # none where the answer ended within the proposals
        kinds += ["accepted"] * r.accepted
        kinds += ["residual" if r.accepted < r.tested else "bonus"] * rest
    text = Detokenizer(tokenizer)
    texts = [text.add([token]) for token, _ in zip(output.tokens, kinds, strict=False)]
    if texts:
        texts[-1] += text.end()
    pieces = list(zip(texts, kinds, strict=False))
    temperature, num = setting
    return DecodedText(prompt_id, temperature, num, pieces)


def survival(conditional: Sequence[float]) -> list[float]:
    """The share of rounds accepted up to each position, from the rates given that all earlier ones
    were: their products, since a round cut short by its answer's end tells nothing of what it did
    not propose (Kaplan and Meier 1958).
    """
    return list(accumulate(conditional, mul))


def ratio(over: float, under: float) -> float:
    """NaN where the clock saw no time pass."""
    return over / under if under > 0 else math.nan


def tokens_per_second(counts: Sequence[Counts]) -> float:
    return ratio(sum(len(c.tokens) for c in counts), sum(c.seconds for c in counts))


def speedup(counts: Sequence[Counts], plain: Sequence[Counts]) -> float:
    return ratio(tokens_per_second(counts), tokens_per_second(plain))


def _by_part(counts: Sequence[Counts]) -> dict[str, float]:
    """`Row.seconds`: they add up to the time of all prompts; none where no parts are known."""
    names = counts[0].parts
    return {name: sum(c.parts[name] for c in counts) for name in names}


def row(
    setting: Setting,
    counts: Sequence[Counts],
    plain: Sequence[Counts],
    weight_ratio: float,
    seed: int,
    least_reach: float = 0.0,
    way: DraftingWay = "autoregressive",
) -> Row:
    """The totals of one setting, from what any engine counts. What only ours knows is NaN, see
    `with_costs`.
    """
    temperature, num = setting
    offered, tested, accepted = (
        [sum(by_position) for by_position in zip(*(getattr(c, name) for c in counts), strict=True)]
        for name in ("offered", "tested", "accepted")
    )
    emitted, plain_emitted = ([len(c.tokens) for c in some] for some in (counts, plain))
    seconds, plain_seconds = ([c.seconds for c in some] for some in (counts, plain))
    rounds = sum(c.rounds for c in counts)
    block_efficiency = sum(emitted) / rounds
    conditional = [a / b for a, b in zip(accepted, tested, strict=True) if b]
    steps = draft_steps(num, sum(offered) / rounds, least_reach, way)
    return Row(
        temperature=temperature,
        num_draft_tokens=num,
        prompts=len(counts),
        rounds=rounds,
        proposed=sum(offered),
        tested=sum(tested),
        accepted=sum(accepted),
        emitted=sum(emitted),
        acceptance_rate=sum(accepted) / sum(tested) if sum(tested) else math.nan,
        acceptance_rate_expected=math.nan,
        acceptance_per_proposal=sum(accepted) / sum(offered) if sum(offered) else math.nan,
        acceptance_by_position=conditional,
        survival_by_position=[count / rounds for count in accepted[: len(conditional)]]
        if least_reach
        else survival(conditional),
        block_efficiency=block_efficiency,
        tokens_per_second=tokens_per_second(counts),
        speedup=speedup(counts, plain),
        speedup_ci95=speedup_interval(emitted, seconds, plain_emitted, plain_seconds, seed),
        cost_ratio=math.nan,
        verify_ratio=math.nan,
        predicted_speedup=math.nan,
        planned_speedup=math.nan,
        mbsu=block_efficiency / (weight_ratio * steps + 1),
        seconds=_by_part(counts),
        least_reach=least_reach,
        drafting=way,
    )


def target_pass(counts: Sequence[Counts]) -> float:
    """Seconds of one pass of the target: a verify pass, or a plain step."""
    return sum(c.parts["target"] for c in counts) / sum(c.rounds for c in counts)


def with_costs(row: Row, draft_passes: int, plain: Sequence[Counts], expected: float) -> Row:
    """A row with what our engine knows beside the counts: the time of its passes, in steps of plain
    decoding, and the `expected` acceptance rate.
    """
    spent, step = row.seconds, target_pass(plain)
    draft_step = spent["draft"] / draft_passes if draft_passes else math.nan
    verify_pass = spent["target"] / row.rounds
    drafting = spent["draft"] / row.rounds  # fewer than γ steps where an answer needs fewer
    cost_ratio = ratio(draft_step, step)
    return replace(
        row,
        acceptance_rate_expected=expected,
        cost_ratio=cost_ratio,
        verify_ratio=ratio(verify_pass, step),
        predicted_speedup=ratio(row.block_efficiency * step, drafting + verify_pass),
        planned_speedup=math.nan
        if row.least_reach
        else planned_speedup(
            row.acceptance_rate, row.num_draft_tokens, cost_ratio, row.draft_steps
        ),
    )
