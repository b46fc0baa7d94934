"""Chi-square tests of what `sample` and `verify` emit over many rounds, on 16 tokens: a wide
vocabulary hides a bias. Needs no reference: the target's probabilities are known.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.gpu_session import Session
from specdistill_kernels import Mode, RowSettings, probabilities, sample, verify

VOCAB, NUM, LENGTH = 16, 2, 3  # tokens, proposals a round, places of a text that are tested
LEAST_P = 1e-6  # a few dozen tests with fresh seeds each time

FILTERS = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
SETTINGS: dict[str, dict[str, float]] = {"T=1": {"temperature": 1.0}, "filters": FILTERS}


def check_streams(session: Session, share: float = 1.0) -> None:
    """Many rows write a text each, where the target's distribution at a place depends on the place
    alone: each place must follow its own, and neighbouring places must be independent.
    """
    rows = 100_000
    if session.smoke:
        rows = 200 if session.interpreted else 4_000
    target = 1.5 * session.normal(LENGTH, VOCAB)
    drafts = {
        "near": target + 0.5 * session.normal(LENGTH, VOCAB),
        "opposite": -target,
        "certain": None,
        "trimmed": target[:, ::2],
    }
    modes: tuple[Mode, ...] = ("token", "block")
    cases = list(product(SETTINGS, drafts, modes))
    for label, kind, mode in cases[::5] if session.interpreted else cases:
        what = f"stream, {kind} draft, {label}, {mode}"
        stream = (target, drafts[kind], SETTINGS[label], mode, rows)
        session.case(what, partial(check_stream, session, what, *stream), share)


def check_stream(
    session: Session,
    what: str,
    target: Tensor,
    draft: Tensor | None,
    settings: dict[str, float],
    mode: Mode,
    rows: int,
) -> None:
    texts = write_texts(session, target, draft, settings, mode, rows)
    found = p_values(texts, target, settings)
    session.check(what, min(found.values()) > LEAST_P, rows=rows, p_values=found)


def rows_of(settings: dict[str, float], rows: int, device: torch.device) -> dict[str, Any]:
    """The same settings for each row, top_k as a whole number."""
    return {name: torch.full((rows,), value, device=device) for name, value in settings.items()}


def write_texts(
    session: Session,
    target: Tensor,
    draft: Tensor | None,
    settings: dict[str, float],
    mode: Mode,
    rows: int,
) -> Tensor:
    """[rows, LENGTH] tokens of as many rounds as it takes. draft: [LENGTH, 16] or, for a trimmed
    vocabulary of the even tokens, [LENGTH, 8]; None for a draft that is certain.
    """
    device = session.device
    columns, seeds = rows_of(settings, rows, device), session.integers(2**62, rows)
    vocab = None
    if draft is not None and draft.shape[1] < VOCAB:
        vocab = torch.arange(0, VOCAB, 2, device=device)
    texts = torch.zeros(rows, LENGTH + NUM + 1, dtype=torch.int64, device=device)
    written = torch.zeros(rows, dtype=torch.int64, device=device)
    for round_ in range(LENGTH):
        own = RowSettings(seeds=seeds, step=torch.full((rows,), round_, device=device), **columns)
        places = [(written + i) % LENGTH for i in range(NUM + 1)]
        more: dict[str, Any] = {}
        if draft is None:
            proposals = torch.stack([target[place].argmax(-1) for place in places[:NUM]], 1)
            logits = None
        else:
            logits = torch.stack([draft[place] for place in places[:NUM]], 1)
            drawn = [
                sample(logits[:, i], own, position=i, backend=session.backend) for i in range(NUM)
            ]
            proposals = torch.stack([d.tokens for d in drawn], 1)
            more["draft_lse"] = torch.stack([d.logsumexp for d in drawn], 1)
        if vocab is not None:
            proposals, more["draft_vocab"] = vocab[proposals], vocab
        out = verify(
            proposals,
            logits,
            torch.stack([target[place] for place in places], 1),
            own,
            lengths=torch.full((rows,), NUM, device=device),
            mode=mode,
            **more,
            backend=session.backend,
        )
        index = torch.arange(NUM + 1, device=device)
        at = written[:, None] + index
        emitted = (index <= out.num_accepted[:, None]) & (at < LENGTH)
        texts[emitted.nonzero()[:, 0], at[emitted]] = out.tokens[emitted]
        written = (written + out.num_accepted + 1).clamp(max=LENGTH)
    return texts[:, :LENGTH]


def p_values(texts: Tensor, target: Tensor, settings: dict[str, float]) -> dict[str, float]:
    """Of each place, and of each two neighbours together."""
    p = probabilities(target.double(), **rows_of(settings, LENGTH, target.device))
    found = {}
    for i in range(LENGTH):
        found[f"{i}"] = chi_square(texts[:, i].bincount(minlength=VOCAB), p[i])
    for i in range(LENGTH - 1):
        pairs = (texts[:, i] * VOCAB + texts[:, i + 1]).bincount(minlength=VOCAB**2)
        found[f"{i},{i + 1}"] = chi_square(pairs, (p[i, :, None] * p[i + 1]).flatten())
    return found


def chi_square(counts: Tensor, p: Tensor) -> float:
    """p-value of counts [K] under probabilities p [K] (Pearson), bins that expect fewer than 5
    together; 0 where something impossible was counted.
    """
    counts, expected = counts.double(), p.double() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    rare = expected < 5
    if bool(rare.any()):
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        some = expected > 0
        counts, expected = counts[some], expected[some]
    if len(expected) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64, device=counts.device)
    return float(torch.special.gammaincc(half, statistic / 2))
