"""Scoring a pair by real speculative decoding, interleaved with plain decoding prompt by prompt in
one process.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.likeness import fingerprint, read_trained
from specdistill.data.prompts import Prompt
from specdistill.data.settings import distinct
from specdistill.decoding import Drafting, Request, Sampling, SpeculativeDecoder, drafter_for
from specdistill.decoding.parallel import AUTO, Way
from specdistill.decoding.records import CacheSize
from specdistill.errors import InputError
from specdistill.models import LanguageModel, check_positions, origin
from specdistill.models.parallel import trained_draft_tokens
from specdistill.progress import Progress, silent
from specdistill.provenance import device_name, git_commit, versions
from specdistill.scoring import lossless
from specdistill.scoring import rows as rows_of
from specdistill.scoring.acceptance import acceptance_chances
from specdistill.scoring.card_rows import LEAST_VERIFY_RATIO, DraftingWay, ModelCard, PromptRow, Row
from specdistill.scoring.choice import Setting
from specdistill.scoring.rows import Decoded, Timed
from specdistill.scoring.scorecard import OWN_ENGINE, Scorecard, Verification
from specdistill.scoring.slices import by_category, by_prompt_length
from specdistill.scoring.template_settings import as_trained
from specdistill.scoring.trust import doubts
from specdistill.scoring.turns import Measured, measured
from specdistill.scoring.verdict import verdict
from specdistill_kernels import Lenience, Mode

WARM_UP_TOKENS = 8
T = TypeVar("T")


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
    drafting: Way = "auto",
    max_seconds: float | None = None,
    keep_text: bool = False,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt plainly and with every γ at every temperature, and measure. `mode` and
    `lenience` are `SpeculativeDecoder`'s: a card with lenience is LOSSY and says so. With
    `least_reach`, `ModelDrafter`'s, γ is the most that a round proposes; a mapping has it by γ, and
    the others do not stop early. A draft with a mask token proposes in parallel, or as `drafting`
    says.

    The settings take turns on each prompt, see `turns.measured`, after a short untimed run of each.
    After `max_seconds` no further prompt is begun, once there are four. Where a verify pass of the
    fastest setting took less time than a plain step, which cannot be, its temperature is measured
    again, once. `keep_text` keeps the first prompt's answer in the fastest setting in the card,
    token by token.
    """
    prompts = _encoded(target, draft, prompts)
    temperatures = [*dict.fromkeys(map(float, _several(temperature)))]
    num_draft_tokens = _several(num_draft_tokens)
    if not prompts:
        raise InputError("there are no prompts to score")
    if not num_draft_tokens or not temperatures:
        raise InputError("score needs at least one num_draft_tokens and one temperature")
    check_lenience(mode, lenience, temperatures)
    draftings = _draftings(num_draft_tokens, drafting, least_reach)
    parallel = any(each.in_parallel(draft) for each in draftings.values())
    way: DraftingWay = "parallel" if parallel else "autoregressive"
    decoders = _decoders(target, draft, draftings, mode, lenience)
    requests = _requests(target, draft, prompts, max_new_tokens, seed)
    decoders[0].check(requests)  # before any work; with a draft the same
    measurement = _measured(decoders, requests, temperatures, max_seconds, progress)
    runs, counts = measurement.runs, rows_of.counted(measurement.runs)
    prompts = prompts[: len(counts[temperatures[0], 0])]

    target_card, draft_card = model_card(target), model_card(draft)
    weight_ratio = draft_card.weight_bytes / target_card.weight_bytes
    verification = Verification.of(mode, lenience)
    settings = [(t, g) for t in temperatures for g in decoders if g]
    rows, per_prompt = list[Row](), list[PromptRow]()
    for t, g in settings:
        progress("evidence", len(rows), len(settings), "expected acceptance")
        reach = draftings[g].least_reach
        row = rows_of.row((t, g), counts[t, g], counts[t, 0], weight_ratio, seed, reach, way)
        expected = math.nan  # a block's acceptance is not that of its tokens
        if mode == "token":
            chances = [
                acceptance_chances(target, draft, p.tokens, one.output, t, lenience, draftings[g])
                for p, one in zip(prompts, runs[t, g], strict=True)
            ]
            expected = torch.cat(chances).mean().item()
        draft_passes = sum(one.draft_passes for one in runs[t, g])
        rows.append(rows_of.with_costs(row, draft_passes, counts[t, 0], expected))
        per_prompt += rows_of.by_prompt((t, g), prompts, counts[t, g], counts[t, 0])
    progress("evidence", len(rows), len(settings), "losslessness")
    baseline = [rows_of.baseline(t, counts[t, 0]) for t in temperatures]
    judged = verdict(
        rows, verification, doubts(baseline, rows, per_prompt), per_prompt, measurement.again
    )
    fastest = (judged.best.temperature, judged.best.num_draft_tokens)
    card = Scorecard(
        target=target_card,
        draft=draft_card,
        provenance=provenance(target, draft, seed, max_new_tokens, prompts) | measurement.facts,
        baseline=baseline,
        rows=rows,
        per_prompt=per_prompt,
        lossless=lossless.evidence(
            target,
            draft,
            [(p.id, p.tokens) for p in prompts],
            _greedy_pairs(prompts, runs),
            draftings,
            seed,
            mode,
            lossy=verification.lossy,
        ),
        verdict=judged,
        verification=verification,
        by_category=by_category(per_prompt, seed),
        by_prompt_length=by_prompt_length(per_prompt, seed),
        example=rows_of.example(target.tokenizer, prompts[0].id, fastest, runs[fastest][0].output)
        if keep_text
        else None,
    )
    progress("evidence", 1, 1)
    return card


def _encoded(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Prompt] | Sequence[EncodedPrompt],
) -> list[EncodedPrompt]:
    ready = [p for p in prompts if isinstance(p, EncodedPrompt)]
    others = [p for p in prompts if isinstance(p, Prompt)]
    return [*ready, *encoded(target.tokenizer, as_trained(others, draft))]


def _several(values: T | Sequence[T]) -> Sequence[T]:
    return values if isinstance(values, Sequence) else [values]


def _draftings(
    num_draft_tokens: Sequence[int], way: Way, least_reach: float | Mapping[int, float]
) -> dict[int, Drafting]:
    """By γ. Raises `InputError` for a least reach that no γ has."""
    if not isinstance(least_reach, Mapping):
        least_reach = dict.fromkeys(num_draft_tokens, least_reach)
    if unused := least_reach.keys() - set(num_draft_tokens):
        raise InputError(f"least_reach is given for γ = {min(unused)}, which is not to be scored")
    return {g: Drafting(way, least_reach.get(g, 0.0)) for g in num_draft_tokens}


def _measured(
    decoders: Mapping[int, SpeculativeDecoder],
    requests: Sequence[Request],
    temperatures: Sequence[float],
    max_seconds: float | None,
    progress: Progress,
) -> Measured[list[Decoded]]:
    """Every request at every temperature by every decoder, after a short untimed run of each."""
    progress("score", 0, len(requests), "a short run of each setting first")
    first = replace(requests[0], max_new_tokens=min(WARM_UP_TOKENS, requests[0].max_new_tokens))

    def ask(setting: Setting, request: Request) -> Timed:
        start = time.perf_counter()
        generation = decoders[setting[1]].run([replace(request, sampling=Sampling(setting[0]))])
        if generation.captures:  # which later runs of these shapes do not do again
            return ask(setting, request)
        return Timed(generation, time.perf_counter() - start)

    for setting in ((t, g) for t in temperatures for g in decoders):
        ask(setting, first)
    return measured(
        lambda setting, number: ask(setting, requests[number]),
        temperatures,
        [g for g in decoders if g],
        len(requests),
        rows_of.without_stalls,
        _slowed,
        progress,
        max_seconds,
    )


def _greedy_pairs(
    prompts: Sequence[EncodedPrompt], runs: Mapping[Setting, Sequence[Decoded]]
) -> list[lossless.GreedyPair]:
    """The greedy answers of every γ beside the plain ones."""
    return [
        lossless.GreedyPair(p.id, p.tokens, plain.output, drafted.output)
        for (t, g), decoded in runs.items()
        if t == 0 and g
        for p, plain, drafted in zip(prompts, runs[0, 0], decoded, strict=True)
    ]


def _slowed(runs: Mapping[Setting, Sequence[Decoded]]) -> float | None:
    """The temperature of the fastest setting, where its verify passes took less time than plain
    steps.
    """
    counts = rows_of.counted(runs)
    drafted = [setting for setting in runs if setting[1]]
    t, g = max(drafted, key=lambda s: rows_of.speedup(counts[s], counts[s[0], 0]))
    verify_pass, step = (rows_of.target_pass(counts[setting]) for setting in ((t, g), (t, 0)))
    return t if rows_of.ratio(verify_pass, step) < LEAST_VERIFY_RATIO else None


def _decoders(
    target: LanguageModel,
    draft: LanguageModel,
    draftings: Mapping[int, Drafting],
    mode: Mode = "token",
    lenience: Lenience | None = None,
) -> dict[int, SpeculativeDecoder]:
    """By γ, each with its way of drafting, and with 0 for plain decoding; each keeps a cache of
    one row.
    """
    return {0: SpeculativeDecoder(target)} | {
        g: SpeculativeDecoder(
            target,
            drafter_for(draft, target.vocab_size, draftings[g]),
            num_draft_tokens=g,
            mode=mode,
            lenience=lenience,
        )
        for g in sorted(draftings)
    }


def cache_size(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    num_draft_tokens: Sequence[int],
    max_new_tokens: int,
) -> CacheSize:
    """What the caches of `score` will take: a row for plain decoding and one for each γ."""
    requests = _requests(target, draft, prompts, max_new_tokens, 0)
    decoders = _decoders(target, draft, dict.fromkeys(num_draft_tokens, AUTO)).values()
    sizes = [decoder.cache_size(requests) for decoder in decoders]
    return CacheSize(
        sum(s.bytes for s in sizes),
        len(sizes),
        max(s.slots for s in sizes),
        max(s.passes for s in sizes),
        max(s.weights for s in sizes),
    )


def _requests(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    max_new_tokens: int,
    seed: int,
) -> list[Request]:
    """Raises `ModelError` for a prompt that is too long for one of the models."""
    lengths = [(p.named, len(p.tokens) + max_new_tokens) for p in prompts]
    check_positions([target, draft], lengths)
    return [Request(p.id, p.tokens, max_new_tokens, seed=seed) for p in prompts]


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


def provenance(
    target: LanguageModel,
    draft: LanguageModel | None,
    seed: int,
    max_new_tokens: int,
    prompts: Sequence[EncodedPrompt],
) -> dict[str, Any]:
    """Device, threads, dtype, versions, git commit, seed, date, what was decoded, and the run that
    made the draft; None where no draft of ours proposes.
    """
    of_draft: dict[str, Any] = {}
    if draft is not None:
        of_draft = {
            "draft_origin": origin(draft),
            "mask_token": draft.mask_token,
            "trained_draft_tokens": trained_draft_tokens(draft),
            "trained_prompts": _trained_prompts(draft, prompts),
        }
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
        "conversation_turns": "last" if all(p.conversation is None for p in prompts) else "all",
        "chat_template_kwargs": distinct(p.settings for p in prompts),
        **of_draft,
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
