"""Scoring a pair by real speculative decoding, interleaved with plain decoding prompt by prompt in
one process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdistill.decoding import Generation, ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.decoding.records import CacheSize, Output
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent
from specdistill.scoring import lossless
from specdistill.scoring.acceptance import expected_acceptance
from specdistill.scoring.provenance import model_card, provenance
from specdistill.scoring.scorecard import Baseline, PromptRow, Row, Scorecard, Verification
from specdistill.scoring.statistics import planned_speedup, speedup_interval
from specdistill.scoring.verdict import verdict
from specdistill_kernels import Lenience, Mode

MIN_PROMPTS = 4


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the models read it."""

    id: str
    tokens: list[int]


@dataclass
class _Runs:
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

    def part(self, name: str) -> float:
        return sum(g.seconds.get(name, 0.0) for g in self.generations)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.emitted) / sum(self.seconds)


def score(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    *,
    num_draft_tokens: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    mode: Mode = "token",
    lenience: Lenience | None = None,
    max_seconds: float | None = None,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt plainly and with every γ at every temperature, and measure. `mode` and
    `lenience` are `SpeculativeDecoder`'s: a card with lenience is LOSSY and says so.

    The settings take turns on each prompt, starting from another one each time, so that a drift of
    the machine's speed falls on all of them alike. A short untimed run of each comes first. After
    `max_seconds` no further prompt is begun, once there are four.
    """
    if not prompts:
        raise InputError("there are no prompts to score")
    if not num_draft_tokens or not temperatures:
        raise InputError("score needs at least one num_draft_tokens and one temperature")
    check_lenience(mode, lenience, temperatures)
    decoders = _decoders(target, draft, num_draft_tokens, mode, lenience)
    settings = [(t, g) for t in temperatures for g in decoders]
    for t, g in settings:
        decoders[g].generate([prompts[0].tokens], max_new_tokens=8, sampling=Sampling(t), seed=seed)
    runs = {setting: _Runs() for setting in settings}
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        turn = i % len(settings)
        for t, g in settings[turn:] + settings[:turn]:
            start = time.perf_counter()
            generation = decoders[g].run(
                [Request(prompt.id, prompt.tokens, max_new_tokens, Sampling(t), seed)]
            )
            runs[t, g].seconds.append(time.perf_counter() - start)
            runs[t, g].generations.append(generation)
        progress("score", i + 1, len(prompts), f"{len(settings)} settings a prompt")
        late = max_seconds is not None and time.perf_counter() - begin > max_seconds
        if late and i + 1 >= MIN_PROMPTS:
            prompts = prompts[: i + 1]
            progress("score", len(prompts), len(prompts), "out of time; the rest is left out")
            break

    target_card, draft_card = model_card(target), model_card(draft)
    weight_ratio = draft_card.weight_bytes / target_card.weight_bytes
    verification = Verification.of(mode, lenience)
    rows = []
    for t, g in settings:
        if g:
            expected = [
                expected_acceptance(target, draft, p.tokens, o, t, lenience)
                for p, o in zip(prompts, runs[t, g].outputs, strict=True)
                if mode == "token"  # a block's acceptance is not that of its tokens
            ]
            rows.append(_row(t, g, runs[t, g], runs[t, 0], expected, weight_ratio, seed))
    return Scorecard(
        target=target_card,
        draft=draft_card,
        provenance=provenance(target, seed, max_new_tokens, prompts),
        baseline=[
            Baseline(
                t, r.tokens_per_second, len(prompts), sum(r.emitted), sum(r.seconds) / r.rounds
            )
            for (t, g), r in runs.items()
            if g == 0
        ],
        rows=rows,
        per_prompt=[
            PromptRow(
                p.id,
                t,
                g,
                r.emitted[i],
                r.generations[i].rounds,
                r.seconds[i],
                runs[t, 0].seconds[i],
                runs[t, 0].emitted[i],
            )
            for (t, g), r in runs.items()
            if g
            for i, p in enumerate(prompts)
        ],
        lossless=lossless.evidence(
            target,
            draft,
            prompts[0].tokens,
            [
                (p.id, p.tokens, base.tokens, out.tokens)
                for (t, g), r in runs.items()
                if t == 0 and g
                for p, base, out in zip(prompts, runs[0, 0].outputs, r.outputs, strict=True)
            ],
            seed,
            mode,
            lossy=verification.lossy,
        ),
        verdict=verdict(rows, verification),
        verification=verification,
    )


def _decoders(
    target: LanguageModel,
    draft: LanguageModel,
    num_draft_tokens: Sequence[int],
    mode: Mode = "token",
    lenience: Lenience | None = None,
) -> dict[int, SpeculativeDecoder]:
    """By γ, with 0 for plain decoding; each keeps a cache of one row."""
    return {0: SpeculativeDecoder(target)} | {
        g: SpeculativeDecoder(
            target,
            ModelDrafter(draft, target.vocab_size),
            num_draft_tokens=g,
            mode=mode,
            lenience=lenience,
        )
        for g in sorted(set(num_draft_tokens))
    }


def cache_size(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    num_draft_tokens: Sequence[int],
    max_new_tokens: int,
) -> CacheSize:
    """What the caches of `score` will take: a row for plain decoding and one for each γ."""
    requests = [Request(p.id, p.tokens, max_new_tokens) for p in prompts]
    decoders = _decoders(target, draft, num_draft_tokens).values()
    sizes = [decoder.cache_size(requests) for decoder in decoders]
    return CacheSize(sum(s.bytes for s in sizes), len(sizes), max(s.slots for s in sizes))


def check_lenience(mode: Mode, lenience: Lenience | None, temperatures: Sequence[float]) -> None:
    """Raises `InputError` where the lenience would do nothing or has no meaning."""
    if lenience is not None and mode != "token":
        raise InputError(
            f"lenience is a rule for single tokens; with verification by {mode}, leave it out"
        )
    if lenience is not None and 0 in temperatures:
        raise InputError(
            "lenience has no effect at temperature 0, where p is 0 or 1; score it at temperature 1 "
            "alone, say, or leave it out"
        )


def _row(
    temperature: float,
    num: int,
    runs: _Runs,
    plain: _Runs,
    expected: list[tuple[float, int]],
    weight_ratio: float,
    seed: int,
) -> Row:
    rounds = [r for output in runs.outputs for r in output.rounds]
    proposed, tested, accepted = (
        sum(getattr(r, name) for r in rounds) for name in ("proposed", "tested", "accepted")
    )
    emitted = sum(runs.emitted)

    def share(counted: list[int], of: list[int]) -> list[float]:
        return [a / b for a, b in zip(counted, of, strict=True) if b]

    kept = [sum(r.accepted > i for r in rounds) for i in range(num)]
    reached = [sum(r.tested > i for r in rounds) for i in range(num)]
    offered = [sum(r.proposed > i for r in rounds) for i in range(num)]
    alpha = accepted / tested if tested else float("nan")
    positions = sum(n for _, n in expected)
    block_efficiency = emitted / len(rounds)
    step = plain.part("target") / plain.rounds
    draft_step = runs.part("draft") / runs.draft_steps if runs.draft_steps else float("nan")
    verify_pass = runs.part("target") / runs.rounds
    draft_steps = runs.draft_steps / runs.rounds  # below γ where an answer needs fewer tokens
    seconds = {name: runs.part(name) for name in ("prefill", "draft", "target", "verify", "other")}
    seconds["loop"] = sum(runs.seconds) - sum(seconds.values())
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
        acceptance_by_position=share(kept, reached),
        survival_by_position=share(kept, offered),
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
        seconds=seconds,
    )
