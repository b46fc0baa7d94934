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
from specdistill_kernels import probabilities, sample, verify

GreedyPair = tuple[
    str, list[int], list[int], list[int]
]  # prompt id, prompt, plain answer, speculative answer


def evidence(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    greedy: Sequence[GreedyPair],
    seed: int,
) -> Lossless:
    """Greedy texts against plain decoding, the target as its own draft, and a chi-square test of
    the emitted tokens.
    """
    same = sum(plain == speculative for _, _, plain, speculative in greedy)
    ties = [explain_difference(target, *pair) for pair in greedy if pair[2] != pair[3]]
    return Lossless(
        (same, len(greedy)),
        ties,
        identity_acceptance(target, prompt, seed),
        distribution_p_value(target, draft, prompt, seed),
    )


@torch.inference_mode()
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
    text = prompt + plain[:at]
    tokens = torch.tensor([text], device=target.device)
    start = max(len(text) - 8, 0)
    at_once = target.logits(target.hidden(tokens)[:, start:])[0]
    cached = CachedModel(target, 1, len(text) + 1)
    cached.prefill(torch.tensor([0], device=target.device), [text[:start]])
    steps = [
        cached.run(tokens[:, i : i + 1], torch.tensor([[i]], device=target.device), i + 1)
        for i in range(start, len(text))
    ]
    one_by_one = target.logits(torch.cat(steps, 1))[0]
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


def identity_acceptance(target: LanguageModel, prompt: list[int], seed: int) -> float:
    """Acceptance rate of the target as its own draft at temperature 1: 1, but for rounding."""
    decoder = SpeculativeDecoder(
        target, ModelDrafter(target, target.vocab_size), num_draft_tokens=4
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
) -> float:
    """p-value of "the emitted tokens follow the target": the pair's own logits after the prompt,
    narrowed to `width` tokens (a wide vocabulary hides a bias), through the real `sample` and
    `verify` with two proposals, `draws` times. Combines the first token with the second of the
    rounds that emitted one, which must be independent of it.
    """
    tokens = torch.tensor([prompt], device=target.device)
    drafter = ModelDrafter(draft, target.vocab_size)
    last = slice(-3, None)
    p_logits = target.logits(target.hidden(tokens)[0, last])
    q_logits = draft.logits(draft.hidden(tokens)[0, last])[:, : drafter.width]
    ids = (
        torch.arange(drafter.width, device=target.device)
        if drafter.vocab is None
        else drafter.vocab
    )
    likely = torch.cat(
        [
            q_logits.mean(0).topk(width // 2).indices,
            p_logits[:, ids].mean(0).topk(width // 2).indices,
        ]
    )
    columns = likely.unique()
    p_rows, q_rows = p_logits[:, ids[columns]], q_logits[:, columns]
    p_rows = p_rows.repeat(3, 1)[:3] if len(p_rows) < 3 else p_rows
    q_rows = q_rows.repeat(2, 1)[:2] if len(q_rows) < 2 else q_rows[:2]

    batch = torch.arange(draws, device=target.device)
    row: dict[str, Any] = {
        "temperature": torch.ones(draws, device=target.device),
        "seeds": batch + seed * draws,
        "step": torch.zeros_like(batch),
    }
    q_batch = q_rows.expand(draws, -1, -1)
    proposals = torch.stack([sample(q_batch[:, i], position=i, **row).tokens for i in range(2)], 1)
    lengths = torch.full_like(batch, 2)
    out = verify(proposals, q_batch, p_rows.expand(draws, -1, -1), lengths=lengths, **row)
    p = probabilities(p_rows, torch.ones(3, device=target.device)).double().cpu()
    first = _p_value(out.tokens[:, 0], p[0])
    second = _p_value(out.tokens[:, 1][out.num_accepted > 0], p[1])
    return float(stats.combine_pvalues([first, second]).pvalue)


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
