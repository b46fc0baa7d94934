"""Prompts that ask the same, or nearly: what makes a score tell less than it seems to."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import pairwise, takewhile
from pathlib import Path

from rapidfuzz.distance import Indel

from specdistill.errors import StorageError
from specdistill.files import write_whole

NEAR = 0.8  # the F1 of the longest common subsequence of words, of what is nearly the same
TRAINED = "trained_prompts.json"  # in a draft's folder
SKETCH, BUCKET, CANDIDATES = 12, 64, 8  # what bounds the search, so that it is not quadratic
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # a sign may be a word


def fingerprint(text: str) -> str:
    """The same for texts that differ in case, white space and punctuation alone."""
    return sha256(" ".join(_words(text)).encode()).hexdigest()[:16]


def nearly_among(these: Sequence[str], those: Sequence[str]) -> list[int]:
    """The places of `these` texts that say what one of `those` does, or nearly. What all of them
    begin and end with, such as a chat template's header, does not count. Looks at a few of `those`
    for each, which share word pairs that few others have.
    """
    lists = _without_shared([_words(text) for text in (*these, *those)])
    ours, theirs = lists[: len(these)], lists[len(these) :]
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    for place, words in enumerate(theirs):
        for key in _sketch(words):
            if len(buckets[key]) < BUCKET:
                buckets[key].append(place)
    same = {tuple(words) for words in theirs}
    return [
        place
        for place, words in enumerate(ours)
        if tuple(words) in same
        or any(
            Indel.normalized_similarity(words, theirs[other]) >= NEAR
            for other, _ in Counter(
                other for key in _sketch(words) for other in buckets.get(key, ())
            ).most_common(CANDIDATES)
        )
    ]


def write_trained(folder: Path, texts: Iterable[str]) -> None:
    """Say in a draft's folder which prompts it was trained on. Raises `StorageError`."""
    try:
        write_whole(folder / TRAINED, json.dumps(sorted({fingerprint(t) for t in texts})) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {folder / TRAINED}: {error.strerror}; free space and resume"
        ) from error


def read_trained(folder: Path) -> frozenset[str]:
    """Fingerprints of the prompts that a draft was trained on; none where nobody knows. Raises
    `StorageError` for a damaged file.
    """
    file = folder / TRAINED
    if not os.path.isfile(file):
        return frozenset()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(known, list) or not all(isinstance(item, str) for item in known):
            raise ValueError("not a list of hashes")
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{file} is damaged ({error}); remove it, or distil again") from error
    return frozenset(known)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def _without_shared(lists: list[list[str]]) -> list[list[str]]:
    """Without the words that all lists begin with, and those that all end with."""
    distinct = {tuple(words) for words in lists}
    if len(distinct) < 2:
        return lists
    first = _shared(distinct)
    last = _shared({words[first:][::-1] for words in distinct})
    return [words[first : len(words) - last] for words in lists]


def _shared(lists: set[tuple[str, ...]]) -> int:
    """How many words all lists begin with: the least and the greatest of them differ first."""
    pairs = zip(min(lists), max(lists), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _sketch(words: list[str]) -> list[int]:
    """A few numbers of a text's word pairs; texts that are alike share some."""
    pairs = {f"{a} {b}" for a, b in pairwise(words)} | ({*words} if len(words) < 4 else set())
    return sorted(zlib.crc32(pair.encode()) for pair in pairs)[:SKETCH]
