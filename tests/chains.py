"""Markov chains as models: their exact distributions are cheap, and the real decoder runs over
them with its real caches and masks, since they read their two last tokens through the cache as
attention would. With the statistics that compare long streams with those distributions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from specdistill.decoding import (
    CombinedDrafter,
    Drafter,
    Generation,
    ModelDrafter,
    NgramDrafter,
    ParallelDrafter,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.models import LanguageModel
from specdistill_kernels import Lenience, Mode

V = 16
WARM = Sampling(1.0)
ALPHA = 1e-7  # a run takes a few hundred p-values; all of them together fail by chance below 1e-4
SIGMAS = 5.0  # of a count; 6e-7 by chance


# --- Models -------------------------------------------------------------------------------------


class Chain(nn.Module):
    """The next token's logits are table[last but one, last]; both are read from the cache, as the
    two last slots that the mask shows."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.size = size = table.shape[-1]
        self.config = SimpleNamespace(
            num_hidden_layers=1,
            max_position_embeddings=4096,
            eos_token_id=None,
            _attn_implementation="sdpa",
        )
        self.config.get_text_config = lambda: self.config
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.embedding = nn.Embedding(size, 1)
        self.table = nn.Embedding.from_pretrained(table.reshape(size**2, size))
        self.head = nn.Linear(size, size, bias=False, dtype=table.dtype)
        self.head.weight = nn.Parameter(torch.eye(size, dtype=table.dtype), False)

    @property
    def base_model(self) -> "Chain":
        return self

    def is_backend_compatible(self) -> bool:
        return False

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any,
        attention_mask: Tensor | None = None,
        **positions: object,
    ) -> SimpleNamespace:
        states = input_ids[:, None, :, None].to(self.head.weight.dtype)
        slots, _ = past_key_values.update(states, states, 0)
        if attention_mask is None:  # one token without a past: what a layer keeps of it is asked
            attention_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool)
        tokens = slots[:, 0, :, 0].long()
        last = attention_mask[:, 0].sum(-1).expand(len(tokens), -1) - 1
        state = tokens.gather(1, (last - 1).clamp(min=0)) * self.size
        state += tokens.gather(1, last)
        return SimpleNamespace(last_hidden_state=self.table(state))


def chain(table: Tensor) -> LanguageModel:
    """A chain over the vocabulary of table [V, V, V]."""
    return LanguageModel("chain", Path(), Chain(table), SimpleNamespace(eos_token_id=None))


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TABLE = 1.5 * seeded(V, V, V, seed=1)
DRAFT_TABLES = {"itself": TABLE, "near": TABLE + 0.7 * seeded(V, V, V, seed=2), "opposite": -TABLE}
TRIMMED = torch.tensor([0, 2, 3, 7, 8, 11, 15])
MASKS = {"parallel": V, "parallel inside": V - 1, "parallel trimmed": V - 1}


def draft_chain(kind: str) -> LanguageModel:
    """One of DRAFT_TABLES, or "trimmed": the near one with seven of the sixteen tokens. One of
    MASKS drafts in parallel, by the near table too where it reads no mask: its mask lies beyond
    the target's tokens, or is one of them.
    """
    if kind in MASKS:
        return _parallel_chain(kind)
    return trimmed(chain(DRAFT_TABLES["near"])) if kind == "trimmed" else chain(DRAFT_TABLES[kind])


def trimmed(draft: LanguageModel) -> LanguageModel:
    draft.model.head = nn.Linear(V, len(TRIMMED), bias=False)
    draft.model.head.weight = nn.Parameter(torch.eye(V)[TRIMMED], False)
    return replace(draft, vocab=TRIMMED)


def _parallel_chain(kind: str) -> LanguageModel:
    mask, size = MASKS[kind], max(V, MASKS[kind] + 1)
    table = 0.7 * seeded(size, size, size, seed=3)
    table[:V, :V, :V] += TABLE
    table[:, mask] = 0.7 * seeded(size, size, seed=4)
    draft = chain(table)
    draft.model.config.pard_token = mask
    return trimmed(draft) if kind == "parallel trimmed" else draft


# --- Exact distributions ------------------------------------------------------------------------


def warped(logits: Tensor, sampling: Sampling) -> np.ndarray:
    """What a token is drawn from, [..., V] float64, written a second time from its definition."""
    x = logits.double().numpy() / sampling.temperature
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if 0 < sampling.top_k < p.shape[-1]:
        p[p < np.sort(p)[..., [-sampling.top_k]]] = 0
        p /= p.sum(-1, keepdims=True)
    if sampling.top_p < 1:
        down = np.sort(p)[..., ::-1]
        needed = (down.cumsum(-1) < sampling.top_p).sum(-1, keepdims=True)
        p[p < np.take_along_axis(down, needed, -1)] = 0
    if sampling.min_p:
        p[p < sampling.min_p * p.max(-1, keepdims=True)] = 0
    return p / p.sum(-1, keepdims=True)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom; the rarest cells are merged until five are expected."""
    assert not counts[expected == 0].sum(), "a token of probability 0 was emitted"
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    merged = max(int(np.searchsorted(expected.cumsum(), 5.0)), 0) + 1
    counts = np.append(counts[:merged].sum(), counts[merged:])
    expected = np.append(expected[:merged].sum(), expected[merged:])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(stats.chi2.sf(*chi_square(counts, expected)))


def transitions(texts: np.ndarray, p: np.ndarray) -> float:
    """The tokens given the two before them, over all contexts at once: p-value of texts [R, L]
    under p [V, V, V]."""
    size = p.shape[-1]
    index = (texts[:, :-2] * size + texts[:, 1:-1]) * size + texts[:, 2:]
    counts = np.bincount(index.ravel(), minlength=size**3).reshape(-1, size)
    parts = [
        chi_square(row, row.sum() * law)
        for row, law in zip(counts, p.reshape(-1, size), strict=True)
        if row.sum()
    ]
    return float(stats.chi2.sf(sum(s for s, _ in parts), sum(df for _, df in parts)))


def positions(texts: np.ndarray, p: np.ndarray, at: Sequence[int]) -> Iterator[tuple[str, float]]:
    """Single tokens, pairs and (coarsened) triples at given places of rows that share a prompt of
    two tokens, against the exact laws there."""
    size = p.shape[-1]
    joint = np.zeros((size, size))
    joint[texts[0, 0], texts[0, 1]] = 1
    for place in range(max(at) + 1):
        triple = joint[..., None] * p  # of tokens place, place + 1, place + 2 of the text
        joint = triple.sum(0)
        if place in at:
            now = texts[:, place : place + 3]
            coarse = triple.reshape(size, size, 4, size // 4).sum(-1)
            for name, law, key in (
                ("token", joint.sum(0), now[:, 2]),
                ("bigram", joint, now[:, 1] * size + now[:, 2]),
                ("trigram", coarse, (now[:, 0] * size + now[:, 1]) * 4 + now[:, 2] // (size // 4)),
            ):
                counts = np.bincount(key, minlength=law.size)
                yield f"{name} at {place}", p_value(counts, len(texts) * law.ravel())


def independence(texts: np.ndarray, p: np.ndarray, lags: int) -> Iterator[tuple[str, float]]:
    """Tokens turned into uniform numbers by their exact conditional law must be independent of
    those up to `lags` places before, beyond what the chain remembers (a coin used twice shows
    here), and of those in the next row."""
    rng = np.random.default_rng(0)
    law = p[texts[:, :-2], texts[:, 1:-1]]
    chosen = texts[:, 2:, None]
    below = np.take_along_axis(law.cumsum(-1), chosen, -1)[..., 0]
    u = below - rng.random(below.shape) * np.take_along_axis(law, chosen, -1)[..., 0]
    bins = (u * 8).astype(int).clip(0, 7)

    def pairs(a: np.ndarray, b: np.ndarray) -> float:
        counts = np.bincount((a * 8 + b).ravel(), minlength=64)
        return p_value(counts, np.full(64, counts.sum() / 64))

    for lag in range(1, lags + 1):
        blocks = bins[:, : bins.shape[1] // (2 * lag) * 2 * lag].reshape(len(bins), -1, 2, lag)
        yield f"lag {lag}", pairs(blocks[:, :, 0], blocks[:, :, 1])  # no number in two pairs
    even = len(bins) // 2 * 2
    yield "next row", pairs(bins[:even:2], bins[1:even:2])


# --- Streams ------------------------------------------------------------------------------------


Lengths = int | tuple[int, float]  # γ, or γ at most and the least reach to go on with


def unpacked(lengths: Lengths) -> tuple[int, float]:
    return lengths if isinstance(lengths, tuple) else (lengths, 0.0)


@dataclass(frozen=True)
class Setting:
    """How a stream is decoded. `draft` is a kind of `draft_chain`, "look-up", or "both": look-up
    with the near chain in the rows without a match."""

    sampling: Sampling = WARM
    draft: str = "near"
    mode: Mode = "token"
    lengths: Lengths = 3
    lenience: Lenience | None = None

    def __str__(self) -> str:
        s = self.sampling
        filters = [f"{n}={getattr(s, n)}" for n in ("top_k", "top_p", "min_p")]
        used = [f for f, off in zip(filters, ("0", "1.0", "0.0"), strict=True) if f[6:] != off]
        return " ".join([self.draft, self.mode, f"γ={self.lengths}", f"T={s.temperature}", *used])


def drafter_of(setting: Setting, size: int) -> Drafter:
    if setting.draft == "look-up":
        return NgramDrafter(longest=3, shortest=1)
    if setting.draft in MASKS:
        return ParallelDrafter(draft_chain(setting.draft), size)
    _, least_reach = unpacked(setting.lengths)
    if setting.draft == "both":
        return CombinedDrafter(
            NgramDrafter(longest=2, shortest=2),
            ModelDrafter(draft_chain("near"), size, least_reach=least_reach),
        )
    return ModelDrafter(draft_chain(setting.draft), size, least_reach=least_reach)


def stream(setting: Setting, rows: int, length: int, seed: int = 0) -> Generation:
    """`rows` answers of `length` tokens to one prompt, all in one batch."""
    decoder = SpeculativeDecoder(
        chain(TABLE),
        drafter_of(setting, V),
        num_draft_tokens=unpacked(setting.lengths)[0],
        batch_size=rows,
        mode=setting.mode,
        lenience=setting.lenience,
    )
    return decoder.generate(
        [[3, 5]] * rows, max_new_tokens=length, sampling=setting.sampling, seed=seed
    )


def texts_of(generation: Generation, prompt: Sequence[int] = (3, 5)) -> np.ndarray:
    return np.array([[*prompt, *output.tokens] for output in generation.outputs])


Overlap = Callable[[Sequence[int], int, int], float]  # of a text, a round's start, a place in it


def expected_overlap(setting: Setting) -> Overlap:
    """Σ min(f(p), q) of what is proposed at a place of a round; f is the lenience, if any. A
    parallel draft reads masks in the places of the round before it.
    """
    p, draft = warped(TABLE, setting.sampling), draft_chain(setting.draft)
    columns = slice(None) if draft.vocab is None else draft.vocab.numpy()
    mask = MASKS.get(setting.draft)
    table = draft.model.table.weight.reshape(draft.model.size, draft.model.size, -1).clone()
    if mask is not None:
        table[..., mask] = -torch.inf
    q = warped(table[..., :V][..., columns], setting.sampling)
    if (lenience := setting.lenience) is not None:
        epsilon = lenience.epsilon
        p = p**epsilon if lenience.kind == "exp" else p / epsilon ** (1 + (lenience.kind == "sq"))

    @cache
    def of(text: tuple[int, int], read: tuple[int, int]) -> float:
        return float(np.minimum(p[text][columns], q[read]).sum())

    def overlap(text: Sequence[int], start: int, place: int) -> float:
        after = [int(token) for token in text[start : start + place + 2]]
        read = after if mask is None else [*after[:2], *[mask] * place]
        return of((after[-2], after[-1]), (read[-2], read[-1]))

    return overlap


def acceptance_errors(generation: Generation, overlap: Overlap) -> tuple[float, float]:
    """Accepted minus expected proposals, and the correlation of the first coins of rounds that
    follow each other, both in standard deviations."""
    accepted, chances, correlation, pairs = 0, [], 0.0, 0
    for text, output in zip(texts_of(generation), generation.outputs, strict=True):
        start, before = 0, 0.0
        for round_ in output.rounds:
            accepted += round_.accepted
            own = [overlap(text, start, place) for place in range(round_.tested)]
            chances += own
            start += len(round_.tokens)
            if own and 0.05 < own[0] < 0.95:
                now = ((round_.accepted > 0) - own[0]) / (own[0] * (1 - own[0])) ** 0.5
                correlation += before * now
                pairs += before != 0
                before = now
    chance = np.array(chances).clip(0, 1)
    sigma = np.sqrt((chance * (1 - chance)).sum())
    return float((accepted - chance.sum()) / max(sigma, 1e-3)), correlation / max(pairs, 1) ** 0.5
