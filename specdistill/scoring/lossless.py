"""Evidence, on the user's own pair, that the draft changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.decoding.cache import CachedModel
from specdistill.models import LanguageModel
from specdistill.scoring.scorecard import Lossless
from specdistill_kernels import Mode, probabilities, sample, verify

GreedyPair = tuple[
    str, list[int], list[int], list[int]
]  # prompt id, prompt, plain answer, speculative answer


def evidence(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    greedy: Sequence[GreedyPair],
    seed: int,
    mode: Mode = "token",
    lossy: bool = False,
) -> Lossless:
    """Greedy texts against plain decoding, the target as its own draft, and a chi-square test of
    the emitted tokens, which a lossy rule does not get: it must fail.
    """
    same = sum(plain == speculative for _, _, plain, speculative in greedy)
    ties = [explain_difference(target, *pair) for pair in greedy if pair[2] != pair[3]]
    return Lossless(
        (same, len(greedy)),
        ties,
        identity_acceptance(target, prompt, seed, mode),
        float("nan") if lossy else distribution_p_value(target, draft, prompt, seed, mode=mode),
    )


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
    return model.logits(at_once)[0], model.logits(torch.cat(steps, 1))[0]


def explain_difference(
    target: LanguageModel,
    prompt_id: str,
    prompt: list[int],
    plain: list[int],
    speculative: list[int],
) -> dict[str, Any]:
    """Is the first difference of two greedy answers a tie? One pass over many tokens rounds
    differently from many passes over one; the size of that rounding is measured on this very text,
    and a tie is a top-two gap of at most twice it.
    """
    at = next(
        (i for i, (a, b) in enumerate(zip(plain, speculative, strict=False)) if a != b),
        min(len(plain), len(speculative)),
    )
    at_once, one_by_one = both_passes(target, prompt + plain[:at], 8)
    rounding = (at_once - one_by_one).abs().max().item()
    top = one_by_one[-1].topk(2).values
    gap = (top[0] - top[1]).item()
    return {
        "prompt_id": prompt_id,
        "position": at,
        "top_two_gap": gap,
        "rounding": rounding,
        "within_rounding": gap <= 2 * rounding,
    }


def identity_acceptance(
    target: LanguageModel, prompt: list[int], seed: int, mode: Mode = "token"
) -> float:
    """Acceptance rate of the target as its own draft at temperature 1: 1, but for rounding."""
    decoder = SpeculativeDecoder(
        target, ModelDrafter(target, target.vocab_size), num_draft_tokens=4, mode=mode
    )
    output = decoder.generate(
        [prompt], max_new_tokens=16, sampling=Sampling(1.0), seed=seed
    ).outputs[0]
    tested = sum(r.tested for r in output.rounds)
    return sum(r.accepted for r in output.rounds) / tested if tested else 1.0


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
    ids = drafter.vocab
    if ids is None:
        ids = torch.arange(drafter.width, device=target.device)
    half = min(width // 2, drafter.width)
    likely = [ids[q_logits.mean(0).topk(half).indices], p_logits.mean(0).topk(half).indices]
    kept = torch.cat(likely).unique()
    shared = torch.isin(kept, ids)
    p_rows = p_logits[:, kept].repeat(3, 1)[:3]  # a prompt of one token has one place
    q_rows = q_logits[:, torch.searchsorted(ids, kept[shared])].repeat(2, 1)[:2]
    draft_ids = shared.nonzero()[:, 0]  # where the draft's columns stand in the narrowed vocabulary

    batch = torch.arange(draws, device=target.device)
    row: dict[str, Any] = {
        "temperature": torch.ones(draws, device=target.device),
        "seeds": batch + seed * draws,
        "step": torch.zeros_like(batch),
    }
    q_batch = q_rows.expand(draws, -1, -1)
    drawn = [sample(q_batch[:, i], position=i, **row) for i in range(2)]
    out = verify(
        torch.stack([draft_ids[d.tokens] for d in drawn], 1),
        q_batch,
        p_rows.expand(draws, -1, -1),
        lengths=torch.full_like(batch, 2),
        draft_vocab=None if drafter.vocab is None else draft_ids,
        draft_lse=torch.stack([d.logsumexp for d in drawn], 1),
        mode=mode,
        **row,
    )
    p = probabilities(p_rows, torch.ones(3, device=target.device)).double().cpu()
    emitted = [out.tokens[out.num_accepted >= i, i] for i in range(3)]
    return combined_p_value([_p_value(tokens, p[i]) for i, tokens in enumerate(emitted)])


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
