"""Evidence that sampled tokens follow the target's distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specdistill.decoding import (
    Drafting,
    ModelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    drafter_for,
)
from specdistill.decoding.parallel import AUTO
from specdistill.decoding.records import Output
from specdistill.models import LanguageModel
from specdistill.scoring.acceptance import draft_states
from specdistill.scoring.statistics import martingale_p_value
from specdistill_kernels import Mode, RowSettings, probabilities, sample, verify

NUM_DRAFT_TOKENS = 4
ROWS, ROW_TOKENS = 8, 16  # sampled texts of a prompt, and their length


def emitted_p_value(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: list[int],
    seed: int,
    mode: Mode,
    draftings: Sequence[Drafting] = (AUTO,),
) -> float:
    """p-value of "the emitted tokens follow the target", by `distribution_p_value` and by texts
    that the pair's own engine samples with each least reach (Bonferroni).
    """
    room = target.max_length - len(prompt)
    requests = [
        Request(str(i), prompt, min(ROW_TOKENS, room), Sampling(1.0), seed) for i in range(ROWS)
    ]
    p_values = [distribution_p_value(target, draft, prompt, seed, mode=mode)]
    for drafting in draftings:
        decoder = SpeculativeDecoder(
            target,
            drafter_for(draft, target.vocab_size, drafting),
            num_draft_tokens=NUM_DRAFT_TOKENS,
            batch_size=ROWS,
            mode=mode,
        )
        texts = [(prompt, output) for output in decoder.run(requests).outputs]
        p_values.append(sampled_p_value(target, draft, texts, seed, drafting))
    return min(1.0, len(p_values) * min(p_values))


@torch.inference_mode()
def sampled_p_value(
    target: LanguageModel,
    draft: LanguageModel,
    texts: Sequence[tuple[list[int], Output]],
    seed: int,
    drafting: Drafting = AUTO,
) -> float:
    """p-value of "texts sampled at temperature 1 follow the target": prompts and answers of any
    engine against the target's stock pass, at full width and with the draft's own columns.

    A token's place in its own distribution is uniform whatever came before (Rosenblatt 1952); in
    the order of q / p, a rule that leans to the draft has low places. Beside that (Kolmogorov and
    Smirnov), no token may come more or less often than its probabilities add up to (Freedman).
    """
    drafter = drafter_for(draft, target.vocab_size, drafting)
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
        q_logits = drafter.columns(draft.logits(draft_states(drafter, prompt, output)))
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
    likely_ids = torch.cat(likely).unique()
    columns = torch.isin(ids, likely_ids).nonzero()[:, 0]
    p_rows = p_logits[:, likely_ids].repeat(3, 1)[:3]  # a prompt of one token has one place
    q_rows = q_logits[:, columns].repeat(2, 1)[:2]
    draft_ids = torch.searchsorted(likely_ids, ids[columns])  # as the draft's own columns stand

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
