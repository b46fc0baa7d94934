"""What outside engines have in common: prompts in turns, and a scorecard of what an engine gives.

Such a card holds the engine's own counts and our clock. What no engine tells (the cost of a draft
step or of a verify pass, Σ min(p, q), time by part) is absent: NaN, null in JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdistill.progress import Progress
from specdistill.scoring.measure import EncodedPrompt, Setting, in_turn
from specdistill.scoring.rows import shares, survival
from specdistill.scoring.scorecard import (
    Baseline,
    Lossless,
    ModelCard,
    PromptRow,
    Row,
    Scorecard,
)
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.statistics import speedup_interval
from specdistill.scoring.trust import doubts
from specdistill.scoring.verdict import verdict

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """An answer and what the engine counted meanwhile. By position in the round [γ]: in how many
    rounds there was a proposal (`offered`), it was tested, it was accepted. `rounds` are the
    target's passes that emitted something; plain decoding has as many as tokens.
    """

    tokens: list[int]
    seconds: float
    rounds: int
    offered: list[int]
    tested: list[int]
    accepted: list[int]


Ask = Callable[[Setting, EncodedPrompt, int], Answer]  # the last is the most tokens to emit
Runs = Mapping[Setting, Sequence[Answer]]


def take_turns(
    ask: Ask,
    prompts: Sequence[EncodedPrompt],
    temperatures: Sequence[float],
    num_draft_tokens: Sequence[int],
    max_new_tokens: int,
    progress: Progress,
) -> dict[Setting, list[Answer]]:
    """Every prompt in every setting, plain decoding included, the settings `in_turn` on each
    prompt, after a short run of each that does not count.
    """
    settings = [(t, g) for t in temperatures for g in (0, *num_draft_tokens)]
    for setting in settings:
        ask(setting, prompts[0], WARM_UP_TOKENS)
    runs: dict[Setting, list[Answer]] = {setting: [] for setting in settings}
    for i, prompt in enumerate(prompts):
        for setting in in_turn(settings, i):
            runs[setting].append(ask(setting, prompt, max_new_tokens))
        progress("score", i + 1, len(prompts), f"{len(settings)} settings a prompt")
    return runs


def scorecard(
    target: ModelCard,
    draft: ModelCard,
    provenance: dict[str, Any],
    prompts: Sequence[EncodedPrompt],
    runs: Runs,
    ties: Sequence[dict[str, Any]],
    seed: int,
) -> Scorecard:
    """The card of what was measured. Greedy texts are compared with the engine's own plain ones;
    `ties` explains differences, where that can be done.
    """
    weight_ratio = draft.weight_bytes / target.weight_bytes
    drafted = [setting for setting in runs if setting[1]]
    rows = [_row(setting, runs, weight_ratio, seed) for setting in drafted]
    baseline = [_baseline(t, runs[t, 0]) for t in dict.fromkeys(t for t, _ in runs)]
    per_prompt = [row for setting in drafted for row in _by_prompt(setting, prompts, runs)]
    greedy = [
        plain.tokens == answer.tokens
        for t, g in drafted
        if t == 0
        for plain, answer in zip(runs[t, 0], runs[t, g], strict=True)
    ]
    return Scorecard(
        target=target,
        draft=draft,
        provenance=provenance,
        baseline=baseline,
        rows=rows,
        per_prompt=per_prompt,
        lossless=Lossless((sum(greedy), len(greedy)), list(ties), math.nan, math.nan),
        verdict=verdict(rows, doubts=doubts(baseline, rows, per_prompt)),
        by_category=by_category(per_prompt, seed),
        by_prompt_length=by_prompt_length(per_prompt, seed),
    )


def _row(setting: Setting, runs: Runs, weight_ratio: float, seed: int) -> Row:
    temperature, num = setting
    answers, plain = runs[setting], runs[temperature, 0]
    offered, tested, accepted = (
        [sum(counts) for counts in zip(*(getattr(a, name) for a in answers), strict=True)]
        for name in ("offered", "tested", "accepted")
    )
    emitted, plain_emitted = ([len(a.tokens) for a in some] for some in (answers, plain))
    seconds, plain_seconds = ([a.seconds for a in some] for some in (answers, plain))
    rounds = sum(a.rounds for a in answers)
    block_efficiency = sum(emitted) / rounds
    speed = sum(emitted) / sum(seconds)
    return Row(
        temperature=temperature,
        num_draft_tokens=num,
        prompts=len(answers),
        rounds=rounds,
        proposed=sum(offered),
        tested=sum(tested),
        accepted=sum(accepted),
        emitted=sum(emitted),
        acceptance_rate=sum(accepted) / sum(tested) if sum(tested) else math.nan,
        acceptance_rate_expected=math.nan,
        acceptance_per_proposal=sum(accepted) / sum(offered) if sum(offered) else math.nan,
        acceptance_by_position=(conditional := shares(accepted, tested)),
        survival_by_position=survival(conditional),
        block_efficiency=block_efficiency,
        tokens_per_second=speed,
        speedup=speed / (sum(plain_emitted) / sum(plain_seconds)),
        speedup_ci95=speedup_interval(emitted, seconds, plain_emitted, plain_seconds, seed),
        cost_ratio=math.nan,
        verify_ratio=math.nan,
        predicted_speedup=math.nan,
        planned_speedup=math.nan,
        mbsu=block_efficiency / (weight_ratio * num + 1),
    )


def _baseline(temperature: float, plain: Sequence[Answer]) -> Baseline:
    tokens, seconds = sum(len(a.tokens) for a in plain), sum(a.seconds for a in plain)
    steps = sum(a.rounds for a in plain)
    return Baseline(temperature, tokens / seconds, len(plain), tokens, seconds / steps)


def _by_prompt(setting: Setting, prompts: Sequence[EncodedPrompt], runs: Runs) -> list[PromptRow]:
    temperature, num = setting
    return [
        PromptRow(
            prompt_id=prompt.id,
            temperature=temperature,
            num_draft_tokens=num,
            emitted=len(answer.tokens),
            rounds=answer.rounds,
            seconds=answer.seconds,
            baseline_seconds=plain.seconds,
            baseline_emitted=len(plain.tokens),
            tested=sum(answer.tested),
            accepted=sum(answer.accepted),
            category=prompt.category,
            prompt_tokens=len(prompt.tokens),
        )
        for prompt, answer, plain in zip(prompts, runs[setting], runs[temperature, 0], strict=True)
    ]
