"""Which answers are kept for training. A filter says of an answer whether it goes; adding one is
one function, one entry in `FILTERS` and its field in `Filters`. Duplicates are found among all.

An answer's tokens are those of the model that wrote it, or, where a server gives text alone, its
`words`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from tokenizers import normalizers, pre_tokenizers

from specdistill import limits
from specdistill.decoding import Sampling

NGRAM = 4  # tokens; shorter ones repeat in good text too


@dataclass(frozen=True)
class Filters:
    """min_tokens: shorter answers go. max_repetition: answers go where a larger share of their
    n-grams of `NGRAM` tokens occurred before in them. truncated: answers go that the token limit
    ended. duplicates: of equal answers one stays, see `repeated`. A removed answer is asked for
    again with another seed up to `retries` times; greedy decoding would give the same again, so
    there it is not.
    """

    min_tokens: int = 0
    max_repetition: float = 1.0
    truncated: bool = False
    duplicates: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        limits.check("min_tokens", self.min_tokens, limits.LEAST_TOKENS)
        limits.check("retries", self.retries, limits.RETRIES)
        limits.check("max_repetition", self.max_repetition, limits.SHARE)

    @property
    def remove(self) -> bool:
        """Whether there is a filter at all."""
        return replace(self, retries=0) != NO_FILTER

    @property
    def written(self) -> int:
        """Answers to a prompt that are written at most: duplicates go when they are there."""
        return 1 + self.retries * self.duplicates

    def retries_of(self, sampling: Sampling) -> int:
        return self.retries if sampling.temperature > 0 else 0


NO_FILTER = Filters()


@dataclass(frozen=True)
class Judged:
    """An answer as a filter sees it. Not `ended`: the limit cut it."""

    tokens: Sequence[Hashable]
    ended: bool


def words(text: str) -> list[str]:
    """Words, punctuation marks and Chinese characters, one by one."""
    apart = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False
    ).normalize_str(text)
    return [word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(apart)]


def repetition(tokens: Sequence[Hashable]) -> float:
    """The share of an answer's n-grams that occurred before in it, 0 to below 1."""
    grams = Counter(tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1))
    total = sum(grams.values())
    return 0.0 if total == 0 else 1 - len(grams) / total


FILTERS: dict[str, Callable[[Filters, Judged], bool]] = {
    "short": lambda f, a: len(a.tokens) < f.min_tokens,
    "repetitive": lambda f, a: repetition(a.tokens) > f.max_repetition,
    "truncated": lambda f, a: f.truncated and not a.ended,
}
DUPLICATE = "duplicate"


def objection(filters: Filters, answer: Judged) -> str | None:
    """Why an answer goes, by the first filter that says so; None if it may stay."""
    return next((name for name, goes in FILTERS.items() if goes(filters, answer)), None)


def repeated(texts: Iterable[tuple[str, Sequence[Hashable]]]) -> set[str]:
    """Of (id, tokens) those ids whose tokens an earlier one has."""
    seen: set[tuple[Hashable, ...]] = set()
    again = set()
    for id_, tokens in texts:
        text = tuple(tokens)
        if text in seen:
            again.add(id_)
        seen.add(text)
    return again
