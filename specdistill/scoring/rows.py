"""From what was decoded and timed to the rows of a scorecard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from specdistill.decoding import Generation
from specdistill.decoding.records import Output
from specdistill.scoring.scorecard import Baseline, Example, Kind, PromptRow, Row
from specdistill.scoring.statistics import planned_speedup, speedup_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdistill.scoring.measure import EncodedPrompt


@dataclass
class Runs:
    """All prompts in one setting: one generation and its wall time each."""

    generations: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def outputs(self) -> list[Output]:
        return [g.outputs[0] for g in self.generations]

    @property
    def emitted(self) -> list[int]:
        return [len(output.tokens) for output in self.outputs]

    @property
    def rounds(self) -> int:
        return sum(g.rounds for g in self.generations)

    @property
    def draft_steps(self) -> int:
        return sum(g.draft_steps for g in self.generations)

    def seconds_without(self, index: int, *parts: str) -> float:
        """The wall time of one prompt less these parts."""
        spent = self.generations[index].seconds
        return self.seconds[index] - sum(spent.get(name, 0.0) for name in parts)

    def part(self, name: str) -> float:
        return sum(g.seconds.get(name, 0.0) for g in self.generations)

    @property
    def parts(self) -> dict[str, float]:
        """`Row.seconds`: they add up to the wall time."""
        names = ("prefill", "draft", "target", "verify", "other")
        seconds = {name: self.part(name) for name in names}
        return {**seconds, "loop": sum(self.seconds) - sum(seconds.values())}

    @property
    def tokens_per_second(self) -> float:
        return sum(self.emitted) / sum(self.seconds)


def baseline(temperature: float, plain: Runs) -> Baseline:
    """Plain decoding in sum."""
    return Baseline(
        temperature=temperature,
        tokens_per_second=plain.tokens_per_second,
        prompts=len(plain.outputs),
        tokens=sum(plain.emitted),
        seconds_per_step=sum(plain.seconds) / plain.rounds,
        seconds=plain.parts,
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
            emitted=runs.emitted[i],
            rounds=runs.generations[i].rounds,
            seconds=runs.seconds[i],
            baseline_seconds=plain.seconds[i],
            baseline_emitted=plain.emitted[i],
            tested=sum(r.tested for r in runs.outputs[i].rounds),
            accepted=sum(r.accepted for r in runs.outputs[i].rounds),
            verifying_seconds=runs.seconds_without(i, "draft", "prefill"),
            stepping_seconds=plain.seconds_without(i, "prefill"),
            category=prompt.category,
            prompt_tokens=len(prompt.tokens),
        )
        for i, prompt in enumerate(prompts)
    ]


def example(
    tokenizer: PreTrainedTokenizerBase, prompt_id: str, setting: tuple[float, int], output: Output
) -> Example:
    """One answer with the origin of every token. A character of several tokens counts to the last
    of them; the others are empty.
    """
    kinds: list[Kind] = []
    for r in output.rounds:
        rest = len(r.tokens) - r.accepted  # none where the answer ended within the proposals
        kinds += ["accepted"] * r.accepted
        kinds += ["residual" if r.accepted < r.tested else "bonus"] * rest
    pieces: list[tuple[str, Kind]] = []
    done = ""
    for count, kind in enumerate(kinds, 1):
        text = str(tokenizer.decode(output.tokens[:count])).rstrip("\ufffd")
        pieces.append((text[len(done) :], kind))
        done = text
    temperature, num = setting
    return Example(prompt_id, temperature, num, pieces)


def shares(counted: Sequence[int], of: Sequence[int]) -> list[float]:
    """By position, as far as there is anything to count."""
    return [a / b for a, b in zip(counted, of, strict=True) if b]


def survival(conditional: Sequence[float]) -> list[float]:
    """The share of rounds accepted up to each position, from the rates given that all earlier ones
    were: their products, since a round cut short by its answer's end tells nothing of what it did
    not propose (Kaplan and Meier 1958).
    """
    return list(accumulate(conditional, mul))


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
    alpha = accepted / tested if tested else float("nan")
    positions = sum(n for _, n in expected)
    block_efficiency = emitted / len(rounds)
    step = plain.part("target") / plain.rounds
    draft_step = runs.part("draft") / runs.draft_steps if runs.draft_steps else float("nan")
    verify_pass = runs.part("target") / runs.rounds
    draft_steps = runs.draft_steps / runs.rounds  # below γ where an answer needs fewer tokens
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
        acceptance_rate_expected=sum(s for s, _ in expected) / positions
        if positions
        else float("nan"),
        acceptance_per_proposal=accepted / proposed if proposed else float("nan"),
        acceptance_by_position=(conditional := shares(kept, reached)),
        survival_by_position=survival(conditional),
        block_efficiency=block_efficiency,
        tokens_per_second=runs.tokens_per_second,
        speedup=runs.tokens_per_second / plain.tokens_per_second,
        speedup_ci95=speedup_interval(
            runs.emitted, runs.seconds, plain.emitted, plain.seconds, seed
        ),
        cost_ratio=draft_step / step,
        verify_ratio=verify_pass / step,
        predicted_speedup=block_efficiency * step / (draft_steps * draft_step + verify_pass),
        planned_speedup=planned_speedup(alpha, num, draft_step / step),
        mbsu=block_efficiency / (weight_ratio * num + 1),
        seconds=runs.parts,
    )
