"""What outside engines have in common: prompts in turns, and a scorecard of what an engine gives.

Such a card holds the engine's own counts and our clock. What no engine tells (the cost of a draft
step or of a verify pass, Σ min(p, q), time by part) is absent: NaN, null in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import Output
from specdistill.errors import DecodingError
from specdistill.models import LanguageModel
from specdistill.progress import Progress
from specdistill.scoring import turns
from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.card_rows import LEAST_VERIFY_RATIO, DraftingWay, ModelCard
from specdistill.scoring.choice import Setting
from specdistill.scoring.lossless import GreedyPair, explain_difference
from specdistill.scoring.rows import STALL, Counts, baseline, by_prompt, row, speedup
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.trust import doubts
from specdistill.scoring.verdict import slow_verifying, verdict

WARM_UP_TOKENS = 8
Ask = Callable[[Setting, EncodedPrompt, int], Counts]  # the last is the most tokens to emit
BySetting = dict[Setting, list[Counts]]  # an answer of every prompt
Measured = turns.Measured[list[Counts]]


def take_turns(
    ask: Ask,
    prompts: Sequence[EncodedPrompt],
    temperatures: Sequence[float],
    num_draft_tokens: Sequence[int],
    max_new_tokens: int,
    progress: Progress,
) -> Measured:
    """What every prompt came to in every setting, see `turns.measured`, after a short run of each
    setting that does not count.
    """
    temperatures = list(dict.fromkeys(temperatures))
    for setting in [(t, g) for t in temperatures for g in (0, *num_draft_tokens)]:
        ask(setting, prompts[0], WARM_UP_TOKENS)
    return turns.measured(
        lambda setting, number: ask(setting, prompts[number], max_new_tokens),
        temperatures,
        num_draft_tokens,
        len(prompts),
        without_stalls,
        slowed_at,
        progress,
    )


def counts_in_sum(
    prompt_id: str, num: int, rounds: int, proposed: int, accepted: Sequence[int]
) -> Counts:
    """From vLLM's counters of one answer, `accepted` by position, of a proposer that proposes `num`
    tokens in every round. Raises `DecodingError` where it did not.
    """
    if proposed != num * rounds:
        raise DecodingError(
            f"prompt {prompt_id}: vLLM proposed {proposed} tokens in {rounds} rounds of {num}; its "
            "counters do not tell in which rounds there were fewer"
        )
    # The prompt's own pass emits the first token, without a proposal.
    tested = [rounds, *accepted[:-1]]
    return Counts([], math.nan, rounds + 1, [rounds] * num, tested, list(accepted))


def without_stalls(answers: turns.Answers[Counts]) -> tuple[BySetting, float]:
    """The first answer of each, with the mean time of all; see `rows.without_stalls`. An engine
    that shows no steps has only the runs of plain decoding to compare: one that took `STALL` times
    as long as the other is left out.
    """
    wall = counted = 0.0
    runs: BySetting = {}
    for setting, prompts in answers.items():
        runs[setting] = []
        for repeats in prompts:
            steps = [step for answer in repeats for step in answer.step_seconds]
            usual = median_low(steps) if len(steps) >= 3 else math.inf
            seconds = [
                a.seconds - sum(step - usual for step in a.step_seconds if step > STALL * usual)
                for a in repeats
            ]
            alike = [spent for spent in seconds if spent <= STALL * min(seconds)]
            runs[setting].append(replace(repeats[0], seconds=sum(alike) / len(alike)))
            wall += sum(answer.seconds for answer in repeats) / len(repeats)
            counted += sum(alike) / len(alike)
    return runs, max(0.0, 1 - counted / wall) if wall > 0 else 0.0


def _fastest(runs: Mapping[Setting, list[Counts]]) -> tuple[Setting, float]:
    """The fastest setting, and the time of a whole round of it, its draft steps and its share of
    the prompt too, over that of a plain step: more than what a verify pass takes.
    """

    def rate(setting: Setting) -> float:
        value = speedup(runs[setting], runs[setting[0], 0])
        return -math.inf if math.isnan(value) else value  # the clock saw no time pass

    def step(answers: list[Counts]) -> float:
        return sum(a.seconds for a in answers) / sum(a.rounds for a in answers)

    setting = max((s for s in runs if s[1]), key=rate)
    plain = step(runs[setting[0], 0])
    return setting, step(runs[setting]) / plain if plain > 0 else math.nan


def slowed_at(runs: Mapping[Setting, list[Counts]]) -> float | None:
    """The temperature of the fastest setting, if its rounds took less time than plain steps."""
    setting, ratio = _fastest(runs)
    return setting[0] if ratio < LEAST_VERIFY_RATIO else None


def _slowed(measured: Measured) -> list[str]:
    """What is wrong then."""
    if slowed_at(measured.runs) is None:
        return []
    setting, ratio = _fastest(measured.runs)
    return [slow_verifying("a whole round", setting, ratio, measured.again == setting[0])]


def scorecard(
    target: ModelCard,
    draft: ModelCard,
    provenance: dict[str, Any],
    prompts: Sequence[EncodedPrompt],
    measured: Measured,
    ties: Sequence[dict[str, Any]],
    seed: int,
    drafting: DraftingWay = "autoregressive",
) -> Scorecard:
    """The card of what was measured. Greedy texts are compared with the engine's own plain ones, if
    there are any; `ties` explains differences, where that can be done.
    """
    runs = measured.runs
    weight_ratio = draft.weight_bytes / target.weight_bytes
    drafted = [setting for setting in runs if setting[1]]
    plain_of = {t: runs.get((t, 0), [Counts.unmeasured()] * len(prompts)) for t, _ in drafted}
    rows = [row(s, runs[s], plain_of[s[0]], weight_ratio, seed, 0.0, drafting) for s in drafted]
    plainly = [baseline(t, runs[t, g]) for t, g in runs if not g]
    per_prompt = [p for s in drafted for p in by_prompt(s, prompts, runs[s], plain_of[s[0]])]
    greedy = [
        plain.tokens == answer.tokens
        for t, g in drafted
        if (t, 0) in runs and t == 0
        for plain, answer in zip(runs[t, 0], runs[t, g], strict=True)
    ]
    return Scorecard(
        target=target,
        draft=draft,
        provenance=provenance | measured.facts,
        baseline=plainly,
        rows=rows,
        per_prompt=per_prompt,
        lossless=Lossless((sum(greedy), len(greedy)), list(ties), math.nan, math.nan),
        verdict=verdict(
            rows,
            doubts=[*doubts(plainly, rows, per_prompt), *(_slowed(measured) if plainly else [])],
            per_prompt=per_prompt,
        ),
        by_category=by_category(per_prompt, seed),
        by_prompt_length=by_prompt_length(per_prompt, seed),
    )


def explained_differences(
    load_target: Callable[[], LanguageModel], prompts: Sequence[EncodedPrompt], measured: Measured
) -> list[dict[str, Any]]:
    """What `explain_difference` says of each greedy text that is not the engine's plain one; the
    target is loaded only where there is such a text.
    """
    runs = measured.runs
    pairs = [
        GreedyPair(prompt.id, prompt.tokens, Output("", plain.tokens), Output("", answer.tokens))
        for (t, g), answers in runs.items()
        if t == 0 and g and (0, 0) in runs
        for prompt, plain, answer in zip(prompts, runs[0, 0], answers, strict=True)
        if plain.tokens != answer.tokens
    ]
    if not pairs:
        return []
    target = load_target()
    return [explain_difference(target, pair, alone=False) for pair in pairs]
