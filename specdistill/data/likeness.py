"""Prompts that ask the same, or nearly, which makes a score on them tell less than it seems to: how
they are found, kept on one side of a split, and remembered with a draft.
"""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import groupby, pairwise, takewhile
from operator import itemgetter
from pathlib import Path

from rapidfuzz.distance import Indel

from specdistill.data.prompts import Prompt
from specdistill.errors import InputError, StorageError
from specdistill.files import write_whole, writing
from specdistill.progress import Note, unsaid

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
    return [place for place, _ in groupby(_pairs(ours, theirs), key=itemgetter(0))]


def split_prompts(
    prompts: Sequence[Prompt], heldout: int, seed: int = 0, note: Note = unsaid
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and `heldout` others drawn by the seed, or fewer where groups do not
    add up to as many; both in their first order. Those that are nearly the same, directly or by way
    of others, and the turns of a conversation are a group and stay on one side. A group that would
    be more than a quarter of the held-out prompts, such as those of one template, is divided, so
    that its kind is neither most of them nor missing; only equal prompts, or turns of one
    conversation, stay together then, and `note` is told of it.

    Raises `InputError` where no prompt would be left on one of the sides.
    """
    if not 1 <= heldout < len(prompts):
        raise InputError(
            f"heldout must be at least 1 and below the number of prompts, {len(prompts)}; got "
            f"{heldout}"
        )
    texts = ["\n".join(turn["content"] for turn in prompt.messages) for prompt in prompts]
    lists = _without_shared([_words(text) for text in texts])
    groups = list(range(len(prompts)))  # of each prompt an earlier one of its group, or itself

    def first(place: int) -> int:
        while groups[place] != place:
            groups[place] = place = groups[groups[place]]
        return place

    begun: dict[str, int] = {}  # by conversation its first turn
    turns = [
        (place, begun.setdefault(prompt.conversation, place))
        for place, prompt in enumerate(prompts)
        if prompt.conversation is not None
    ]
    for one, other in (*turns, *_pairs(lists, lists)):
        low, high = sorted((first(one), first(other)))
        groups[high] = low
    sizes, largest = Counter(map(first, groups)), min(max(heldout // 4, 4), heldout)
    members: defaultdict[object, list[int]] = defaultdict(list)
    for place, words in enumerate(lists):
        apart = prompts[place].conversation or tuple(words)
        members[first(place) if sizes[first(place)] <= largest else apart].append(place)
    drawn: set[int] = set()
    for group in random.Random(seed).sample([*members.values()], len(members)):
        if len(drawn) + len(group) <= heldout:
            drawn.update(group)
    if not drawn:
        raise InputError(
            f"all {len(prompts)} prompts say the same in groups of more than {heldout}, so none "
            "can be held out; give more prompts, or held-out ones in a file of their own"
        )
    divided = Counter(map(first, drawn))
    if alike := sum(sizes[group] for group in divided if divided[group] < sizes[group]):
        note(
            f"{alike} of {len(prompts)} prompts are nearly alike in groups too large to be held "
            "out whole, and are on both sides of the split: the score is for prompts like those "
            "that are trained on, unless held-out ones are given in a file of their own"
        )
    sides: tuple[list[Prompt], list[Prompt]] = [], []
    for place, prompt in enumerate(prompts):
        sides[place in drawn].append(prompt)
    return sides


def write_trained(folder: Path, texts: Iterable[str]) -> None:
    """Say in a draft's folder which prompts it was trained on. Raises `StorageError`."""
    with writing(folder / TRAINED, "free space and resume"):
        write_whole(folder / TRAINED, json.dumps(sorted({fingerprint(t) for t in texts})) + "\n")


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


def _pairs(ours: list[list[str]], theirs: list[list[str]]) -> Iterator[tuple[int, int]]:
    """The places of lists of words that are nearly the same: those of ours in order, with the first
    of theirs that is equal and some of the others.
    """
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    same: dict[tuple[str, ...], int] = {}
    for place, words in enumerate(theirs):
        same.setdefault(tuple(words), place)
        for key in _sketch(words):
            if len(buckets[key]) < BUCKET:
                buckets[key].append(place)
    for place, words in enumerate(ours):
        if (equal := same.get(tuple(words))) is not None:
            yield place, equal
        near = Counter(other for key in _sketch(words) for other in buckets.get(key, ()))
        for other, _ in near.most_common(CANDIDATES):
            if other != equal and Indel.normalized_similarity(words, theirs[other]) >= NEAR:
                yield place, other


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
