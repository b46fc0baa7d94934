"""From what was decoded and timed to the rows of a scorecard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from statistics import median_low
from typing import TYPE_CHECKING

from specdistill.decoding import Detokenizer, Generation
from specdistill.decoding.records import Output
from specdistill.scoring.choice import Setting
from specdistill.scoring.scorecard import Baseline, DecodedText, Kind, PromptRow, Row
from specdistill.scoring.statistics import planned_speedup, speedup_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdistill.data.chat import EncodedPrompt

STEP_PARTS = ("draft", "target", "verify", "other")  # of a round
PARTS = ("prefill", *STEP_PARTS, "loop")
STALL = 3.0  # a step that took so many medians was held up by something else


@dataclass(frozen=True)
class Timed:
    """One prompt decoded once, and its wall time."""

    generation: Generation
    seconds: float


@dataclass
class Runs:
    """All prompts in one setting, an entry each. A prompt that was decoded several times, as plain
    decoding is, has the counts of one and the mean of the times, which are without stalls.

    `parts` split a prompt's seconds, see `Row.seconds`.
    """

    outputs: list[Output] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    draft_passes: list[int] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def emitted(self) -> list[int]:
        return [len(output.tokens) for output in self.outputs]

    @property
    def seconds(self) -> list[float]:
        return [sum(parts.values()) for parts in self.parts]

    @property
    def rounds(self) -> int:
        return sum(self.passes)

    @property
    def draft_steps(self) -> int:
        return sum(self.draft_passes)

    def seconds_without(self, index: int, *names: str) -> float:
        """The time of one prompt less these parts."""
        return sum(spent for name, spent in self.parts[index].items() if name not in names)

    @property
    def spent(self) -> dict[str, float]:
        """`Row.seconds`: they add up to the time of all prompts."""
        return {name: sum(parts[name] for parts in self.parts) for name in PARTS}

    @property
    def tokens_per_second(self) -> float:
        return ratio(sum(self.emitted), sum(self.seconds))


def without_stalls(
    timed: Mapping[Setting, Sequence[Sequence[Timed]]],
) -> tuple[dict[Setting, Runs], float]:
    """The runs of every setting, and the share of the time that was left out of them as stalls.
    `timed` has for every prompt the times that it was decoded in the setting, one or more.

    The rounds of a run do the same work, so one that took `STALL` times as long as the median, of
    the run or, where that has fewer than three rounds, of the setting, was held up by something
    else: it counts as the median. So does the time of a prompt's prefill, and that between rounds,
    beside the prompt's other runs. Plain decoding and drafts are treated alike, so that neither
    gains by it.
    """
    usual = _usual_of_prompts(timed)
    found: dict[Setting, Runs] = {}
    wall = 0.0
    for setting, prompts in timed.items():
        runs = found[setting] = Runs()
        every = [step for repeats in prompts for run in repeats for step in _steps(run)]
        for i, repeats in enumerate(prompts):
            steps = [step for run in repeats for step in _steps(run)]
            parts = _steady(steps, steps if len(steps) >= 3 else every)
            for name in ("prefill", "loop"):
                parts[name] = sum(
                    usual[i][name] if spent > STALL * usual[i][name] else spent
                    for spent in (_once(run)[name] for run in repeats)
                )
            first = repeats[0].generation
            runs.outputs.append(first.outputs[0])
            runs.passes.append(first.rounds)
            runs.draft_passes.append(first.draft_steps)
            runs.parts.append({name: parts[name] / len(repeats) for name in PARTS})
            wall += sum(run.seconds for run in repeats) / len(repeats)
    counted = sum(sum(runs.seconds) for runs in found.values())
    return found, max(0.0, 1 - counted / wall) if wall > 0 else 0.0


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


def baseline(temperature: float, plain: Runs) -> Baseline:
    """Plain decoding in sum."""
    return Baseline(
        temperature=temperature,
        tokens_per_second=plain.tokens_per_second,
        prompts=len(plain.outputs),
        tokens=sum(plain.emitted),
        seconds_per_step=sum(plain.seconds) / plain.rounds,
        seconds=plain.spent,
    )


def by_prompt(
    temperature: float, num: int, prompts: Sequence[EncodedPrompt], runs: Runs, plain: Runs
) -> list[PromptRow]:
    """One setting, prompt by prompt."""
    return [
        PromptRow(
            prompt_id=prompt.id,
            temperature=temperature,
            num_draft_tokens=num,
            emitted=len(output.tokens),
            rounds=runs.passes[i],
            seconds=sum(runs.parts[i].values()),
            baseline_seconds=sum(plain.parts[i].values()),
            baseline_emitted=len(plain.outputs[i].tokens),
            tested=sum(r.tested for r in output.rounds),
            accepted=sum(r.accepted for r in output.rounds),
            verifying_seconds=runs.seconds_without(i, "draft", "prefill"),
            stepping_seconds=plain.seconds_without(i, "prefill"),
            category=prompt.category,
            prompt_tokens=len(prompt.tokens),
        )
        for i, (prompt, output) in enumerate(zip(prompts, runs.outputs, strict=True))
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
    told = [text.add([token]) for token, _ in zip(output.tokens, kinds, strict=False)]
    if told:
        told[-1] += text.end()
    pieces = list(zip(told, kinds, strict=False))
    temperature, num = setting
    return DecodedText(prompt_id, temperature, num, pieces)


def shares(counted: Sequence[int], of: Sequence[int]) -> list[float]:
    """By position, as far as there is anything to count."""
    return [a / b for a, b in zip(counted, of, strict=True) if b]


def survival(conditional: Sequence[float]) -> list[float]:
    """The share of rounds accepted up to each position, from the rates given that all earlier ones
    were: their products, since a round cut short by its answer's end tells nothing of what it did
    not propose (Kaplan and Meier 1958).
    """
    return list(accumulate(conditional, mul))


def speedup(runs: Runs, plain: Runs) -> float:
    return ratio(runs.tokens_per_second, plain.tokens_per_second)


def verify_ratio(runs: Runs, plain: Runs) -> float:
    """Time of a verify pass over that of a plain step, the target's passes alone."""
    step = plain.spent["target"] / plain.rounds
    return ratio(runs.spent["target"] / runs.rounds, step)


def ratio(over: float, under: float) -> float:
    """NaN where the clock saw no time pass."""
    return over / under if under > 0 else math.nan


def row(
    temperature: float,
    num: int,
    runs: Runs,
    plain: Runs,
    expected: list[tuple[float, int]],
    weight_ratio: float,
    seed: int,
) -> Row:
    """The totals of one setting; `expected` is `expected_acceptance`'s of each prompt."""
    rounds = [r for output in runs.outputs for r in output.rounds]
    proposed, tested, accepted = (
        sum(getattr(r, name) for r in rounds) for name in ("proposed", "tested", "accepted")
    )
    emitted = sum(runs.emitted)

    kept = [sum(r.accepted > i for r in rounds) for i in range(num)]
    reached = [sum(r.tested > i for r in rounds) for i in range(num)]
    alpha = accepted / tested if tested else math.nan
    positions = sum(n for _, n in expected)
    block_efficiency = emitted / len(rounds)
    step = plain.spent["target"] / plain.rounds
    spent = runs.spent
    draft_step = spent["draft"] / runs.draft_steps if runs.draft_steps else math.nan
    verify_pass = spent["target"] / runs.rounds
    drafting = spent["draft"] / runs.rounds  # fewer than γ steps where an answer needs fewer
    return Row(
        temperature=temperature,
        num_draft_tokens=num,
        prompts=len(runs.outputs),
        rounds=len(rounds),
        proposed=proposed,
        tested=tested,
        accepted=accepted,
        emitted=emitted,
        acceptance_rate=alpha,
        acceptance_rate_expected=sum(s for s, _ in expected) / positions if positions else math.nan,
        acceptance_per_proposal=accepted / proposed if proposed else math.nan,
        acceptance_by_position=(conditional := shares(kept, reached)),
        survival_by_position=survival(conditional),
        block_efficiency=block_efficiency,
        tokens_per_second=runs.tokens_per_second,
        speedup=speedup(runs, plain),
        speedup_ci95=speedup_interval(
            runs.emitted, runs.seconds, plain.emitted, plain.seconds, seed
        ),
        cost_ratio=ratio(draft_step, step),
        verify_ratio=verify_ratio(runs, plain),
        predicted_speedup=ratio(block_efficiency * step, drafting + verify_pass),
        planned_speedup=planned_speedup(alpha, num, ratio(draft_step, step)),
        mbsu=block_efficiency / (weight_ratio * num + 1),
        seconds=spent,
    )
