"""Evidence, on the user's own pair, that the draft changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from specdistill.decoding import (
    CacheSize,
    Drafting,
    ModelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    drafter_for,
)
from specdistill.decoding.cache import CachedModel
from specdistill.decoding.parallel import AUTO
from specdistill.decoding.records import Output
from specdistill.models import LanguageModel
from specdistill.models.memory import free_bytes
from specdistill.models.packed_linear import packs
from specdistill.models.packing import widened
from specdistill.scoring.card_evidence import LEAST_IDENTITY, Float32, Lossless
from specdistill.scoring.sampled_texts import (
    NUM_DRAFT_TOKENS,
    ROW_TOKENS,
    ROWS,
    emitted_p_value,
)
from specdistill_kernels import Mode

SHARE, SHARE_TOKENS = 4, 16  # prompts and new tokens of the greedy texts in float32
FALSE_ALARM = 1e-4  # how often a single check may fail though nothing is wrong


@dataclass(frozen=True)
class GreedyPair:
    """A prompt's greedy answers."""

    prompt_id: str
    prompt: list[int]
    plain: Output
    speculative: Output

    @property
    def identical(self) -> bool:
        return self.plain.tokens == self.speculative.tokens


def evidence(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[str, list[int]]],
    greedy: Sequence[GreedyPair],
    draftings: Mapping[int, Drafting],
    seed: int,
    mode: Mode = "token",
    lossy: bool = False,
) -> Lossless:
    """Greedy texts against plain decoding, in float32 too where the pair decodes in half precision;
    the target as its own draft; and tests of the distribution of sampled tokens, which a lossy rule
    does not get: it must fail. `prompts` are ids and tokens, `draftings` by γ. What is decoded for
    this alone are the shortest of them, in the order of the others: their caches are the smallest.
    """
    same = sum(pair.identical for pair in greedy)
    ties = [explain_difference(target, pair) for pair in greedy if not pair.identical]
    half = target.dtype.itemsize < 4 and not lossy
    prompts = shortest(prompts)
    prompt, most = prompts[0][1], max(draftings)
    identity, least = identity_acceptance(target, prompt, seed, mode)
    ways = list(dict.fromkeys(draftings.values()))
    return Lossless(
        (same, len(greedy)),
        ties,
        identity,
        math.nan if lossy else emitted_p_value(target, draft, prompt, seed, mode, ways),
        str(target.dtype).removeprefix("torch."),
        least,
        greedy_in_float32(target, draft, prompts, most, seed, draftings[most]) if half else None,
    )


def shortest(prompts: Sequence[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
    """The `SHARE` shortest of ids and tokens, the first of equals first."""
    return sorted(prompts, key=lambda prompt: len(prompt[1]))[:SHARE]


def evidence_bytes(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
    lossy: bool = False,
) -> int:
    """About what `evidence` takes at most, for caches, passes and copies of the models in float32,
    beside what a measurement keeps.
    """
    pair, twin = (drafter_for(m, target.vocab_size, AUTO) for m in (draft, target))
    prompts = shortest(prompts)
    sampled = [(str(i), prompts[0][1]) for i in range(ROWS)]
    parts = [_size(target, twin, prompts[:1], NUM_DRAFT_TOKENS)]
    if not lossy:
        parts.append(_size(target, pair, sampled, NUM_DRAFT_TOKENS))
    most = max(part.bytes + part.passes for part in parts)
    if lossy or target.dtype.itemsize >= 4:
        return most
    return max(most, _copies(target, draft) + _wide_size(target, pair, prompts, num_draft_tokens))


def _copies(target: LanguageModel, draft: LanguageModel) -> int:
    """Bytes of both models in float32, of what they are made of, and of packed weights."""
    packed = 4 if target.device.type == "cpu" and packs(torch.float32) else 0
    return sum(
        p.numel() * (4 + max(p.element_size(), packed))
        for m in (target, draft)
        for p in m.model.parameters()
    )


def _wide_size(
    target: LanguageModel,
    drafter: ModelDrafter,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
) -> int:
    """In float32, with its passes."""
    size = _size(target, drafter, prompts, num_draft_tokens)
    return (size.bytes + size.passes) * 4 // target.dtype.itemsize


def _size(
    target: LanguageModel,
    drafter: ModelDrafter,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
) -> CacheSize:
    decoder = SpeculativeDecoder(
        target, drafter, num_draft_tokens=num_draft_tokens, batch_size=len(prompts)
    )
    return decoder.cache_size(_requests(target, prompts, SHARE_TOKENS))


def _requests(
    target: LanguageModel, prompts: Sequence[tuple[str, list[int]]], max_new_tokens: int
) -> list[Request]:
    """Greedy ones, of no more tokens than the target has positions for."""
    return [
        Request(id_, prompt, min(max_new_tokens, target.max_length - len(prompt)))
        for id_, prompt in prompts
    ]


def greedy_in_float32(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
    seed: int,
    drafting: Drafting = AUTO,
) -> Float32:
    """Greedy texts of the pair in float32, where next to nothing is left for rounding to decide,
    all in one batch, which reads the weights for all of them at once, where memory suffices for
    their caches, and else one by one. Where it does not suffice for copies of both models, either,
    it says so instead.
    """
    needed = _copies(target, draft)
    free, drafter = free_bytes(target.device), drafter_for(draft, target.vocab_size, drafting)
    caches = _wide_size(target, drafter, prompts, num_draft_tokens)
    row = _wide_size(target, drafter, [max(prompts, key=lambda p: len(p[1]))], num_draft_tokens)
    if needed + row > free:
        return Float32(
            missing=f"copies of both models take {(needed + row) / 1e9:.1f} GB with a row of their "
            f"caches, and {free / 1e9:.1f} GB are free on {target.device}"
        )
    try:
        wide = widened(target)
        pairs = greedy_pairs(
            wide,
            widened(draft),
            prompts,
            num_draft_tokens,
            SHARE_TOKENS,
            batch_size=len(prompts) if needed + caches <= free else 1,
            drafting=drafting,
        )
        return Float32(
            (sum(pair.identical for pair in pairs), len(pairs)),
            [explain_difference(wide, pair, alone=False) for pair in pairs if not pair.identical],
            identity_acceptance(wide, prompts[0][1], seed)[0],
        )
    except Exception as error:  # evidence beside a measurement, which it must not cost
        return Float32(missing=f"{type(error).__name__}: {error}".split("\n")[0])


def greedy_pairs(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
    max_new_tokens: int,
    batch_size: int = 1,
    drafting: Drafting = AUTO,
) -> list[GreedyPair]:
    """Every prompt's greedy answers, plain and with the draft."""
    requests = _requests(target, prompts, max_new_tokens)
    drafter = drafter_for(draft, target.vocab_size, drafting)
    plain = SpeculativeDecoder(target, batch_size=batch_size).run(requests).outputs
    speculative = SpeculativeDecoder(
        target, drafter, num_draft_tokens=num_draft_tokens, batch_size=batch_size
    )
    pairs = zip(prompts, plain, speculative.run(requests).outputs, strict=True)
    return [GreedyPair(id_, prompt, one, other) for (id_, prompt), one, other in pairs]


@torch.inference_mode()
def both_passes(model: LanguageModel, text: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Logits [n, V] at the last `count` positions of a text or all it has, by one pass over many
    tokens and by passes over one token each. The difference is rounding, the kind by which
    speculative decoding may part from plain decoding.
    """
    tokens = torch.tensor([text], device=model.device)
    start = max(len(text) - count, 0)
    places = torch.arange(start, len(text), device=model.device)[None]
    cached = CachedModel(model, 1, len(text) + 1)
    cached.prefill(torch.tensor([0], device=model.device), [text[:start]])
    at_once = cached.run(tokens[:, start:], places, len(text))
    steps = [
        cached.run(tokens[:, i : i + 1], places[:, i - start : i - start + 1], i + 1)
        for i in range(start, len(text))
    ]
    return cached.logits(at_once)[0], cached.logits(torch.cat(steps, 1))[0]


def moved_by_rounding(model: LanguageModel, text: list[int]) -> Tensor:
    """Total variation between the distributions after `both_passes` at the end of a text [n]."""
    p, other = (logits.double().softmax(-1) for logits in both_passes(model, text, 16))
    return (p - other).abs().sum(-1) / 2


def explained_by_rounding(rounding: float, trials: int, draws: int = 1) -> int:
    """How many of `trials` may go another way by rounding, where each takes `draws` draws and
    rounding is taken to be twice the measured share of probability that it moves: the bound is
    passed less than once in 1 / `FALSE_ALARM`.
    """
    return int(stats.binom.isf(FALSE_ALARM, trials, min(1.0, 2 * draws * rounding)))


def explain_difference(
    target: LanguageModel, pair: GreedyPair, alone: bool = True
) -> dict[str, Any]:
    """Is the first difference of two greedy answers a tie that rounding decides? Both passes are
    made again, as wide as the engine's and after the same ones: the plain token must be the best of
    the one, the draft's side that of the other, and what they differ by of the size of rounding.

    The passes of answers that were not decoded `alone`, or by another engine, cannot be made again:
    there both tokens must be nearer to the best than twice the rounding that is measured here.
    """
    plain, other = pair.plain.tokens, pair.speculative.tokens
    at = next(
        (i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b),
        min(len(plain), len(other)),
    )
    difference = {"prompt_id": pair.prompt_id, "position": at}
    if at == min(len(plain), len(other)):  # one of them ended too early, or too late
        return {**difference, "top_two_gap": None, "rounding": None, "within_rounding": False}
    tokens = torch.tensor([plain[at], other[at]], device=target.device)
    if alone:
        one, many = (logits_at(target, pair.prompt, o, at) for o in (pair.plain, pair.speculative))
        gap = (one[tokens[0]] - one[tokens[1]]).item()
        rounding = (one - many)[tokens].abs().max().item()
        decided = [one.argmax().item(), many.argmax().item()] == tokens.tolist()
    else:
        at_once, one_by_one = both_passes(target, pair.prompt + plain[:at], 8)
        one = one_by_one[-1]
        gap = (one.max() - one[tokens].min()).item()
        rounding = (at_once - one_by_one).abs().max().item()
        decided = gap <= 2 * rounding
    return {
        **difference,
        "top_two_gap": gap,
        "rounding": rounding,
        "within_rounding": decided and rounding <= most_rounding(target, one),
    }


def most_rounding(model: LanguageModel, logits: Tensor) -> float:
    """The largest difference of a logit that passes for rounding: the root of the dtype's
    precision, in the largest logit.
    """
    return math.sqrt(torch.finfo(model.dtype).eps) * logits.abs().max().item()


@torch.inference_mode()
def logits_at(target: LanguageModel, prompt: list[int], answer: Output, at: int) -> Tensor:
    """The logits [V] from which the engine took token `at` of an answer, made again by passes as
    wide as its rounds.
    """
    device, text = target.device, prompt + answer.tokens
    widest = 1 + max(r.proposed for r in answer.rounds)
    cached = CachedModel(target, 1, len(text) + widest)
    cached.prefill(torch.tensor([0], device=device), [prompt[:-1]])
    start, emitted = len(prompt) - 1, 0
    for r in answer.rounds:
        width = r.proposed + 1
        read = (text[start : start + width] + [0] * width)[:width]  # whatever was rejected
        places = torch.arange(start, start + width, device=device)[None]
        hidden = cached.run(torch.tensor([read], device=device), places, start + width)
        if at < emitted + len(r.tokens):
            return cached.logits(hidden)[0, at - emitted]
        start, emitted = start + len(r.tokens), emitted + len(r.tokens)
    raise IndexError(f"the answer has {emitted} tokens, not {at + 1}")


def identity_acceptance(
    target: LanguageModel, prompt: list[int], seed: int, mode: Mode = "token"
) -> tuple[float, float]:
    """Acceptance rate of the target as its own draft at temperature 1, which is 1 but for rounding,
    and the least that holds. What rounding explains is measured, which takes many passes, only
    where the rate is not above `LEAST_IDENTITY` anyhow.
    """
    decoder = SpeculativeDecoder(
        target,
        ModelDrafter(target, target.vocab_size),
        num_draft_tokens=NUM_DRAFT_TOKENS,
        mode=mode,
    )
    room = min(ROW_TOKENS, target.max_length - len(prompt))
    output = decoder.generate(
        [prompt], max_new_tokens=room, sampling=Sampling(1.0), seed=seed
    ).outputs[0]
    tested = sum(r.tested for r in output.rounds)
    if not tested:
        return 1.0, LEAST_IDENTITY
    rate = sum(r.accepted for r in output.rounds) / tested
    if rate > LEAST_IDENTITY:
        return rate, LEAST_IDENTITY
    rounding = moved_by_rounding(target, prompt + output.tokens).mean().item()
    explained = explained_by_rounding(rounding, tested)
    return rate, min(LEAST_IDENTITY, 1 - (explained + 0.5) / tested)
