"""Scorecards of simulated timings, whose counts, sums and speeds agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.card_rows import (
    Baseline,
    DraftingWay,
    ModelCard,
    PromptRow,
    Row,
    draft_steps,
)
from specdistill.scoring.choice import speedup_of
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.slices import by_category
from specdistill.scoring.statistics import planned_speedup
from specdistill.scoring.verdict import verdict

STEP = 0.05  # seconds of a plain step
VERIFY = 1.15  # a round without its draft steps, in plain steps
DRAFT_STEP = 0.1


def simulate(
    alphas: Mapping[tuple[float, int], float],
    *,
    prompts: int = 24,
    seed: int = 0,
    workload: int = 0,
    draft: str = "a",
    noise: float = 0.03,
    slowed: float = 1.0,
    intervals: bool = True,
    drafting: DraftingWay = "autoregressive",
) -> Scorecard:
    """A card with a row for every (temperature, γ) of `alphas`, its acceptance rate.

    `workload` draws the prompts: how long each answer is and how much easier than the others for
    any draft. `seed` draws the timing noise and the machine's drift, which a prompt's runs share.
    `slowed` is what plain decoding was slowed down by. Without `intervals`, which take time, those
    of the rows and categories are left out.
    """
    asked = np.random.default_rng([7, workload])
    lengths = asked.integers(40, 120, prompts)
    ease = asked.normal(0, 0.25, prompts)
    rng = np.random.default_rng([11, seed, workload])
    per_prompt: list[PromptRow] = []
    rows: list[Row] = []
    baseline: list[Baseline] = []
    drift = rng.uniform(0.7, 1.4, prompts)
    for temperature in sorted({t for t, _ in alphas}):
        plain = lengths * STEP * slowed * drift * rng.normal(1, noise, prompts)
        baseline.append(
            Baseline(
                temperature,
                lengths.sum() / plain.sum(),
                prompts,
                int(lengths.sum()),
                plain.sum() / lengths.sum(),
                {"prefill": 0.0, "target": float(plain.sum())},
            )
        )
        for (t, gamma), alpha in sorted(alphas.items()):
            if t != temperature:
                continue
            mine = 1 / (1 + np.exp(-(np.log(alpha / (1 - alpha)) + ease)))
            block = sum(mine**i for i in range(gamma + 1))
            emitted = lengths
            if temperature:  # sampled texts have lengths of their own
                emitted = np.round(lengths * rng.uniform(0.6, 1.4, prompts)).astype(int)
            rounds = np.maximum(1, np.round(emitted / block)).astype(int)
            accepted = emitted - rounds
            tested = np.maximum(accepted, np.round(accepted / mine)).astype(int)
            jitter = drift * rng.normal(1, noise, prompts)
            steps = rounds * (1 if drafting == "parallel" else gamma)
            proposing = steps * DRAFT_STEP * STEP * jitter
            verifying = rounds * VERIFY * STEP * jitter
            seconds = proposing + verifying
            per_prompt += [
                PromptRow(
                    prompt_id=f"p{i}",
                    temperature=t,
                    num_draft_tokens=gamma,
                    emitted=int(emitted[i]),
                    rounds=int(rounds[i]),
                    seconds=float(seconds[i]),
                    baseline_seconds=float(plain[i]),
                    baseline_emitted=int(lengths[i]),
                    tested=int(tested[i]),
                    accepted=int(accepted[i]),
                    verifying_seconds=float(verifying[i]),
                    stepping_seconds=float(plain[i]),
                    category=("reply", "steps")[i % 2],
                )
                for i in range(prompts)
            ]
            rows.append(_row(per_prompt[-prompts:], intervals, drafting))
    greedy = sum(row.temperature == 0 for row in per_prompt)
    return Scorecard(
        target=ModelCard("my/target", 1_000_000, 4_000_000, "float32", 512, "ab" * 32),
        draft=ModelCard(f"run/{draft}", 100_000, 400_000, "float32", 512, (draft * 64)[:64]),
        provenance={
            "device": "a processor",
            "threads": 2,
            "dtype": "float32",
            "versions": {"specdistill": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "git": None,
            "seed": seed,
            "date": "2026-11-22T10:00:00+00:00",
            "engine": "specdistill",
            "max_new_tokens": 128,
            "prompts_sha256": f"{prompts:032x}{workload:032x}",
        },
        baseline=baseline,
        rows=rows,
        per_prompt=per_prompt,
        lossless=Lossless((greedy, greedy), [], 1.0, 0.4),
        verdict=verdict(rows, per_prompt=per_prompt if intervals else ()),
        by_category=by_category(per_prompt, 0) if intervals else [],
    )


def _row(prompts: list[PromptRow], intervals: bool, drafting: DraftingWay) -> Row:
    def total(name: str) -> Any:
        return sum(getattr(prompt, name) for prompt in prompts)

    temperature, gamma = prompts[0].temperature, prompts[0].num_draft_tokens
    emitted, rounds, tested, accepted = map(total, ("emitted", "rounds", "tested", "accepted"))
    seconds, verifying, plain = map(total, ("seconds", "verifying_seconds", "baseline_seconds"))
    step = plain / total("baseline_emitted")
    proposing = seconds - verifying
    interval = speedup_of(prompts)[1:] if intervals else (math.nan, math.nan)
    rate = accepted / tested
    steps = draft_steps(gamma, gamma, 0.0, drafting)
    survival = [rate ** (i + 1) for i in range(gamma)]
    return Row(
        temperature=temperature,
        num_draft_tokens=gamma,
        prompts=len(prompts),
        rounds=rounds,
        proposed=rounds * gamma,
        tested=tested,
        accepted=accepted,
        emitted=emitted,
        acceptance_rate=rate,
        acceptance_rate_expected=rate,
        acceptance_per_proposal=accepted / (rounds * gamma),
        acceptance_by_position=[rate] * gamma,
        survival_by_position=survival,
        block_efficiency=emitted / rounds,
        tokens_per_second=emitted / seconds,
        speedup=emitted / seconds * step,
        speedup_ci95=interval,
        cost_ratio=DRAFT_STEP,
        verify_ratio=verifying / rounds / step,
        predicted_speedup=emitted * step / seconds,
        planned_speedup=planned_speedup(rate, gamma, DRAFT_STEP, steps),
        mbsu=emitted / rounds / (steps * 0.1 + 1),
        seconds={"prefill": 0.0, "draft": proposing, "target": verifying},
        drafting=drafting,
    )
