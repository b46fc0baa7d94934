"""Scoring a pair by real speculative decoding, interleaved with plain decoding prompt by prompt in
one process.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.likeness import fingerprint, read_trained
from specdistill.data.prompts import Prompt
from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.decoding.records import CacheSize
from specdistill.errors import InputError
from specdistill.models import LanguageModel, check_positions, origin
from specdistill.progress import Progress, silent
from specdistill.provenance import device_name, git_commit, versions
from specdistill.scoring import lossless
from specdistill.scoring import rows as rows_of
from specdistill.scoring.acceptance import expected_acceptance
from specdistill.scoring.card_rows import LEAST_VERIFY_RATIO, ModelCard, Row
from specdistill.scoring.choice import Setting
from specdistill.scoring.rows import Counts, Runs
from specdistill.scoring.scorecard import OWN_ENGINE, Scorecard, Verification
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.trust import doubts
from specdistill.scoring.verdict import verdict
from specdistill_kernels import Lenience, Mode

MIN_PROMPTS = 4
Times = dict[Setting, list[list[rows_of.Timed]]]  # by prompt, as often as it was decoded
T = TypeVar("T")


def in_turn(
    temperatures: Sequence[float], num_draft_tokens: Sequence[int], number: int
) -> list[Setting]:
    """What a prompt is decoded in, in this order: at each temperature plainly, with every γ, and
    plainly again, so that a drift of the machine's speed falls on both alike. Each `number` starts
    from another temperature and another γ.
    """
    return [
        (t, g)
        for t in _from(temperatures, number)
        for g in (0, *_from(num_draft_tokens, number), 0)
    ]


def _from(values: Sequence[T], number: int) -> list[T]:
    first = number % len(values)
    return [*values[first:], *values[:first]]


def score(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Prompt] | Sequence[EncodedPrompt],
    *,
    num_draft_tokens: int | Sequence[int] = range(1, 9),
    temperature: float | Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    seed: int = 0,
    mode: Mode = "token",
    lenience: Lenience | None = None,
    least_reach: float | Mapping[int, float] = 0.0,
    max_seconds: float | None = None,
    keep_text: bool = False,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt plainly and with every γ at every temperature, and measure. `mode` and
    `lenience` are `SpeculativeDecoder`'s: a card with lenience is LOSSY and says so. With
    `least_reach`, `ModelDrafter`'s, γ is the most that a round proposes; a mapping has it by γ, and
    the others do not stop early.

    The settings take turns on each prompt, see `in_turn`, after a short untimed run of each. After
    `max_seconds` no further prompt is begun, once there are four. Where a verify pass of the
    fastest setting took less time than a plain step, which cannot be, its temperature is measured
    again, once. `keep_text` keeps the first prompt's answer in the fastest setting in the card,
    token by token.
    """
    prompts = _encoded(target, prompts)
    temperatures = [*dict.fromkeys(map(float, _several(temperature)))]
    num_draft_tokens = _several(num_draft_tokens)
    if not prompts:
        raise InputError("there are no prompts to score")
    if not num_draft_tokens or not temperatures:
        raise InputError("score needs at least one num_draft_tokens and one temperature")
    check_lenience(mode, lenience, temperatures)
    if not isinstance(least_reach, Mapping):
        least_reach = dict.fromkeys(num_draft_tokens, least_reach)
    if unused := least_reach.keys() - set(num_draft_tokens):
        raise InputError(f"least_reach is given for γ = {min(unused)}, which is not to be scored")
    reaches = {g: least_reach.get(g, 0.0) for g in num_draft_tokens}
    decoders = _decoders(target, draft, reaches, mode, lenience)
    settings = [(t, g) for t in temperatures for g in decoders]
    requests = [Request(p.id, p.tokens, max_new_tokens, seed=seed) for p in prompts]
    decoders[0].check(requests)  # before any work; with a draft the same
    check_positions([draft], ((p.id, len(p.tokens) + max_new_tokens) for p in prompts))
    progress("score", 0, len(prompts), "a short run of each setting first")
    for t, g in settings:
        decoders[g].generate([prompts[0].tokens], max_new_tokens=8, sampling=Sampling(t), seed=seed)

    def decode(at: Sequence[float], words: str, seconds: float | None = None) -> Times:
        return _decode(decoders, requests[: len(prompts)], at, seconds, partial(progress, words))

    before = cpu_times()
    times = decode(temperatures, "score", max_seconds)
    prompts = prompts[: len(times[settings[0]])]
    runs, stalls = rows_of.without_stalls(times)
    counts = rows_of.counted(runs)
    again = _slowed(runs, counts)
    if again is not None:  # once: a machine that is never at rest is told of, not waited for
        times |= decode([again], "again")
        runs, stalls = rows_of.without_stalls(times)
        counts = rows_of.counted(runs)
    told = provenance(target, draft, seed, max_new_tokens, prompts)
    told |= {"steal": stolen(before), "stalls": stalls, "measured_again": again}

    target_card, draft_card = model_card(target), model_card(draft)
    weight_ratio = draft_card.weight_bytes / target_card.weight_bytes
    verification = Verification.of(mode, lenience)
    rows: list[Row] = []
    for t, g in settings:
        progress("evidence", len(rows), len(settings), "expected acceptance")
        if g:
            expected = [
                expected_acceptance(target, draft, p.tokens, o, t, lenience)
                for p, o in zip(prompts, runs[t, g].outputs, strict=True)
                if mode == "token"  # a block's acceptance is not that of its tokens
            ]
            row = rows_of.row((t, g), counts[t, g], counts[t, 0], weight_ratio, seed, reaches[g])
            rows.append(rows_of.with_costs(row, runs[t, g], runs[t, 0], expected))
    progress("evidence", len(rows), len(settings), "losslessness")
    baseline = [rows_of.baseline(t, counts[t, 0]) for t in temperatures]
    per_prompt = [
        row
        for t, g in settings
        if g
        for row in rows_of.by_prompt((t, g), prompts, counts[t, g], counts[t, 0])
    ]
    judged = verdict(rows, verification, doubts(baseline, rows, per_prompt), per_prompt, again)
    fastest = (judged.best.temperature, judged.best.num_draft_tokens)
    card = Scorecard(
        target=target_card,
        draft=draft_card,
        provenance=told,
        baseline=baseline,
        rows=rows,
        per_prompt=per_prompt,
        lossless=lossless.evidence(
            target,
            draft,
            [(p.id, p.tokens) for p in prompts],
            [
                lossless.GreedyPair(p.id, p.tokens, base, out)
                for (t, g), r in runs.items()
                if t == 0 and g
                for p, base, out in zip(prompts, runs[0, 0].outputs, r.outputs, strict=True)
            ],
            reaches,
            seed,
            mode,
            lossy=verification.lossy,
        ),
        verdict=judged,
        verification=verification,
        by_category=by_category(per_prompt, seed),
        by_prompt_length=by_prompt_length(per_prompt, seed),
        example=rows_of.example(target.tokenizer, prompts[0].id, fastest, runs[fastest].outputs[0])
        if keep_text
        else None,
    )
    progress("evidence", 1, 1)
    return card


def _encoded(
    target: LanguageModel, prompts: Sequence[Prompt] | Sequence[EncodedPrompt]
) -> list[EncodedPrompt]:
    ready = [p for p in prompts if isinstance(p, EncodedPrompt)]
    asked = [p for p in prompts if isinstance(p, Prompt)]
    return [*ready, *encoded(target.tokenizer, asked)]


def _several(values: T | Sequence[T]) -> Sequence[T]:
    return values if isinstance(values, Sequence) else [values]


def _decode(
    decoders: Mapping[int, SpeculativeDecoder],
    requests: Sequence[Request],
    temperatures: Sequence[float],
    max_seconds: float | None,
    progress: Callable[[float, float, str], None],
) -> Times:
    """The requests at every temperature, `in_turn`, as far as there is time."""
    times: Times = {(t, g): [] for t in temperatures for g in decoders}
    words = f"{len(times)} settings a prompt"
    begin = time.perf_counter()
    for i, request in enumerate(requests):
        for by_request in times.values():
            by_request.append([])
        turns = in_turn(temperatures, [g for g in decoders if g], i)
        for turn, (t, g) in enumerate(turns):
            progress(i + turn / len(turns), len(requests), words)
            start = time.perf_counter()
            generation = decoders[g].run([replace(request, sampling=Sampling(t))])
            spent = time.perf_counter() - start
            times[t, g][-1].append(rows_of.Timed(generation, spent))
        late = max_seconds is not None and time.perf_counter() - begin > max_seconds
        if late and MIN_PROMPTS <= i + 1 < len(requests):
            words = "out of time; the rest is left out"
            break
    progress(len(requests), len(requests), words)
    return times


def _slowed(
    runs: Mapping[Setting, Runs], counts: Mapping[Setting, Sequence[Counts]]
) -> float | None:
    """The temperature of the fastest setting, where its verify passes took less time than plain
    steps.
    """
    speeds = {(t, g): rows_of.speedup(counts[t, g], counts[t, 0]) for t, g in counts if g}
    t, g = max(speeds, key=lambda setting: speeds[setting])
    slow = rows_of.verify_ratio(runs[t, g], runs[t, 0]) < LEAST_VERIFY_RATIO
    return t if slow else None


def _decoders(
    target: LanguageModel,
    draft: LanguageModel,
    reaches: Mapping[int, float],
    mode: Mode = "token",
    lenience: Lenience | None = None,
) -> dict[int, SpeculativeDecoder]:
    """By γ, each with its least reach, and with 0 for plain decoding; each keeps a cache of one
    row.
    """
    return {0: SpeculativeDecoder(target)} | {
        g: SpeculativeDecoder(
            target,
            ModelDrafter(draft, target.vocab_size, least_reach=reaches[g]),
            num_draft_tokens=g,
            mode=mode,
            lenience=lenience,
        )
        for g in sorted(reaches)
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
    decoders = _decoders(target, draft, dict.fromkeys(num_draft_tokens, 0.0)).values()
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


def model_card(model: LanguageModel) -> ModelCard:
    return ModelCard(
        name=model.name,
        parameters=model.parameters(),
        weight_bytes=model.weight_bytes(),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.vocab_size,
        sha256=model.sha256(),
    )


def cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """The time that a hypervisor gave to others (steal) and all time of the processors so far, in
    ticks; None on systems that do not tell.
    """
    try:
        name, *ticks = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        counts = [int(tick) for tick in ticks[:8]]  # a guest's, which follow, are in user's
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(counts) < 8:
        return None
    return counts[7], sum(counts)


def stolen(before: tuple[int, int] | None) -> float | None:
    """The share of the processors' time that went to others since `before`."""
    now = cpu_times()
    if before is None or now is None:
        return None
    steal, total = (b - a for a, b in zip(before, now, strict=True))
    return steal / total if total > 0 else 0.0


def provenance(
    target: LanguageModel,
    draft: LanguageModel,
    seed: int,
    max_new_tokens: int,
    prompts: Sequence[EncodedPrompt],
) -> dict[str, Any]:
    """Device, threads, dtype, versions, git commit, seed, date, what was decoded, and the run that
    made the draft.
    """
    return {
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "versions": versions(),
        "git": git_commit(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engine": OWN_ENGINE,
        "max_new_tokens": max_new_tokens,
        "prompts_sha256": hashlib.sha256(
            json.dumps([[p.id, p.tokens] for p in prompts]).encode()
        ).hexdigest(),
        "draft_origin": origin(draft),
        "trained_prompts": _trained_prompts(draft, prompts),
    }


def _trained_prompts(
    draft: LanguageModel, prompts: Sequence[EncodedPrompt]
) -> dict[str, Any] | None:
    """How many prompts the draft was trained on, a hash of them, and how many of those scored are
    among them; None where nobody knows.
    """
    known = read_trained(draft.path)
    if not known:
        return None
    texts = [str(draft.tokenizer.decode(p.tokens, skip_special_tokens=True)) for p in prompts]
    return {
        "prompts": len(known),
        "sha256": hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest(),
        "scored": sum(fingerprint(text) in known for text in texts),
    }


def trained_line(card: Scorecard) -> str:
    """What to say of a score on prompts of training; empty where there is nothing."""
    trained = card.provenance.get("trained_prompts") or {}
    if not trained.get("scored"):
        return ""
    return (
        f"{trained['scored']} of {card.rows[0].prompts} prompts were trained on: on new ones the "
        "draft accepts less; score it on others"
    )
