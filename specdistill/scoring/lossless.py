"""Evidence, on the user's own pair, that the draft changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.decoding.cache import CachedModel
from specdistill.decoding.records import Output
from specdistill.models import LanguageModel
from specdistill.models.memory import free_bytes
from specdistill.models.packing import widened
from specdistill.scoring.acceptance import draft_states
from specdistill.scoring.scorecard import LEAST_IDENTITY, Float32, Lossless
from specdistill.scoring.statistics import martingale_p_value
from specdistill_kernels import Mode, RowSettings, probabilities, sample, verify

SHARE, SHARE_TOKENS = 4, 16  # prompts and new tokens of the greedy texts in float32
ROWS, ROW_TOKENS = 8, 16  # sampled texts of a prompt, and their length
NUM_DRAFT_TOKENS = 4
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
    num_draft_tokens: int,
    seed: int,
    mode: Mode = "token",
    lossy: bool = False,
    least_reach: float = 0.0,
) -> Lossless:
    """Greedy texts against plain decoding, in float32 too where the pair decodes in half precision;
    the target as its own draft; and tests of the distribution of sampled tokens, which a lossy rule
    does not get: it must fail. `prompts` are ids and tokens.
    """
    same = sum(pair.identical for pair in greedy)
    ties = [explain_difference(target, pair) for pair in greedy if not pair.identical]
    half = target.dtype.itemsize < 4 and not lossy
    prompt = prompts[0][1]
    identity, least = identity_acceptance(target, prompt, seed, mode)
    return Lossless(
        (same, len(greedy)),
        ties,
        identity,
        float("nan") if lossy else emitted_p_value(target, draft, prompt, seed, mode, least_reach),
        str(target.dtype).removeprefix("torch."),
        least,
        greedy_in_float32(target, draft, prompts[:SHARE], num_draft_tokens, seed, least_reach)
        if half
        else None,
    )


def emitted_p_value(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    seed: int,
    mode: Mode,
    least_reach: float = 0.0,
) -> float:
    """p-value of "the emitted tokens follow the target", by `distribution_p_value` and by texts
    that the pair's own engine samples (Bonferroni).
    """
    decoder = SpeculativeDecoder(
        target,
        ModelDrafter(draft, target.vocab_size, least_reach=least_reach),
        num_draft_tokens=NUM_DRAFT_TOKENS,
        batch_size=ROWS,
        mode=mode,
    )
    room = target.max_length - len(prompt)
    requests = [
        Request(str(i), prompt, min(ROW_TOKENS, room), Sampling(1.0), seed) for i in range(ROWS)
    ]
    texts = [(prompt, output) for output in decoder.run(requests).outputs]
    narrow = distribution_p_value(target, draft, prompt, seed, mode=mode)
    return min(1.0, 2 * min(narrow, sampled_p_value(target, draft, texts, seed)))


def greedy_in_float32(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[tuple[str, list[int]]],
    num_draft_tokens: int,
    seed: int,
    least_reach: float = 0.0,
) -> Float32:
    """Greedy texts of the pair in float32, where next to nothing is left for rounding to decide,
    all in one batch, which reads the weights for all of them at once. Where memory does not suffice
    for copies of both models, it says so instead.
    """
    needed = sum(
        p.numel() * (4 + p.element_size()) for m in (target, draft) for p in m.model.parameters()
    )
    if needed > (free := free_bytes(target.device)):
        return Float32(
            missing=f"copies of both models take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            f"are free on {target.device}"
        )
    try:
        wide = widened(target)
        pairs = greedy_pairs(
            wide,
            widened(draft),
            prompts,
            num_draft_tokens,
            SHARE_TOKENS,
            batch_size=len(prompts),
            least_reach=least_reach,
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
    least_reach: float = 0.0,
) -> list[GreedyPair]:
    """Every prompt's greedy answers, plain and with the draft."""
    requests = [
        Request(id_, prompt, min(max_new_tokens, target.max_length - len(prompt)))
        for id_, prompt in prompts
    ]
    drafter = ModelDrafter(draft, target.vocab_size, least_reach=least_reach)
    plain, speculative = (
        decoder.run(requests).outputs
        for decoder in (
            SpeculativeDecoder(target, batch_size=batch_size),
            SpeculativeDecoder(
                target, drafter, num_draft_tokens=num_draft_tokens, batch_size=batch_size
            ),
        )
    )
    return [
        GreedyPair(id_, prompt, one, other)
        for (id_, prompt), one, other in zip(prompts, plain, speculative, strict=True)
    ]


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


@torch.inference_mode()
def sampled_p_value(
    target: LanguageModel,
    draft: LanguageModel,
    texts: Sequence[tuple[list[int], Output]],
    seed: int,
) -> float:
    """p-value of "texts sampled at temperature 1 follow the target": prompts and answers of any
    engine against the target's stock pass, at full width and with the draft's own columns.

    A token's place in its own distribution is uniform whatever came before (Rosenblatt 1952); in
    the order of q / p, a rule that leans to the draft has low places. Beside that (Kolmogorov and
    Smirnov), no token may come more or less often than its probabilities add up to (Freedman).
    """
    drafter = ModelDrafter(draft, target.vocab_size)
    coins = torch.Generator().manual_seed(seed)
    places: list[float] = []
    expected, variance, count = (
        torch.zeros(target.vocab_size, dtype=torch.float64, device=target.device) for _ in range(3)
    )
    for prompt, output in texts:
        if not output.tokens:
            continue
        tokens = torch.tensor([prompt + output.tokens], device=target.device)
        rows = slice(len(prompt) - 1, -1)
        warm = torch.ones(len(output.tokens), device=target.device)
        p = probabilities(target.logits(target.hidden(tokens)[0, rows]), warm).double()
        q_logits = draft.logits(draft_states(drafter, tokens)[rows])[:, : drafter.width]
        q = torch.zeros_like(p)
        q.index_add_(1, _columns(drafter), probabilities(q_logits, warm).double())
        drawn = tokens[0, len(prompt) :, None]
        lean = q / p.clamp(min=1e-300)
        before = p.where(lean > lean.gather(1, drawn), 0).sum(1)
        alike = p.where(lean == lean.gather(1, drawn), 0).sum(1)
        coin = torch.rand(len(warm), generator=coins, dtype=torch.float64).to(p.device)
        places += (before + coin * alike).clamp(0, 1).tolist()
        expected += p.sum(0)
        variance += (p * (1 - p)).sum(0)
        count.index_add_(0, drawn[:, 0], torch.ones_like(coin))
    if not places:
        return 1.0
    off = (count - expected).abs()
    worst = [
        martingale_p_value(off[i].item(), variance[i].item())
        for i in (off / (variance + 1).sqrt()).topk(min(8, len(off))).indices
    ]
    uniform = float(stats.kstest(places, "uniform").pvalue)
    return min(1.0, 2 * min(uniform, len(off) * min(worst)))


@torch.inference_mode()
def distribution_p_value(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    seed: int,
    draws: int = 20_000,
    width: int = 16,
    mode: Mode = "token",
) -> float:
    """p-value of "the emitted tokens follow the target": the pair's own logits at the three places
    of the prompt's end where the target is least certain (a certain one shows no bias), narrowed to
    the `width` likeliest tokens of either (a wide vocabulary hides it), through the real `sample`
    and `verify` with two proposals, `draws` times.

    Combines the tests of the first token, and of the second and third in the rounds that emitted
    them. The target's rows do not depend on what was proposed, so each token must follow its own
    row there too, in either mode.
    """
    tokens = torch.tensor([prompt], device=target.device)
    drafter = ModelDrafter(draft, target.vocab_size)
    p_logits = target.logits(target.hidden(tokens)[0, -64:])
    certainty = p_logits.softmax(-1).square().sum(-1)
    places = certainty.topk(min(3, len(certainty)), largest=False).indices
    p_logits = p_logits[places]
    hidden = draft.hidden(drafter.readable(tokens))[0, -64:][places]
    q_logits = draft.logits(hidden)[:, : drafter.width]
    ids = _columns(drafter)
    half = min(width // 2, drafter.width)
    likely = [ids[q_logits.mean(0).topk(half).indices], p_logits.mean(0).topk(half).indices]
    kept = torch.cat(likely).unique()
    columns = torch.isin(ids, kept).nonzero()[:, 0]
    p_rows = p_logits[:, kept].repeat(3, 1)[:3]  # a prompt of one token has one place
    q_rows = q_logits[:, columns].repeat(2, 1)[:2]
    draft_ids = torch.searchsorted(kept, ids[columns])  # as the draft's own columns stand

    batch = torch.arange(draws, device=target.device)
    warm = torch.ones(draws, device=target.device)
    rows = RowSettings(warm, batch + seed * draws, torch.zeros_like(batch))
    q_batch = q_rows.expand(draws, -1, -1)
    drawn = [sample(q_batch[:, i], rows, position=i) for i in range(2)]
    out = verify(
        torch.stack([draft_ids[d.tokens] for d in drawn], 1),
        q_batch,
        p_rows.expand(draws, -1, -1),
        rows,
        lengths=torch.full_like(batch, 2),
        draft_vocab=None if drafter.vocab is None else draft_ids,
        draft_lse=torch.stack([d.logsumexp for d in drawn], 1),
        mode=mode,
    )
    p = probabilities(p_rows, torch.ones(3, device=target.device)).double().cpu()
    emitted = [out.tokens[out.num_accepted >= i, i] for i in range(3)]
    return combined_p_value([_p_value(tokens, p[i]) for i, tokens in enumerate(emitted)])


def _columns(drafter: ModelDrafter) -> Tensor:
    """The target id of each column of the draft's logits [Vd]."""
    if drafter.vocab is not None:
        return drafter.vocab
    return torch.arange(drafter.width, device=drafter.draft.device)


def combined_p_value(values: Sequence[float]) -> float:
    """Fisher's combination of independent tests; a p-value too small for a float is no error."""
    return float(stats.combine_pvalues(np.maximum(values, 1e-300)).pvalue)


def _p_value(tokens: Tensor, p: Tensor) -> float:
    """Chi-square of token counts against p; cells of fewer than five expected are merged."""
    counts = torch.bincount(tokens.cpu(), minlength=len(p)).numpy()
    expected = (p / p.sum() * counts.sum()).numpy()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    if used.sum() < 2 or counts[~used].sum():
        return 1.0 if not counts[~used].sum() else 0.0
    return float(
        stats.chisquare(
            counts[used], expected[used] * counts[used].sum() / expected[used].sum()
        ).pvalue
    )
