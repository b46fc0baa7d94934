"""Near duplicates are found and others are not, in bounded time; trained prompts are known."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from specdistill.data.likeness import (
    TRAINED,
    fingerprint,
    nearly_among,
    read_trained,
    split_prompts,
    write_trained,
)
from specdistill.data.prompt_list import PromptList
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.errors import InputError, StorageError

ASKED = [
    "Write a polite email to a customer whose parcel is late",
    "How do I bake bread without yeast at home?",
    "天気はどうですか、東京の明日の予報を教えて",
]


@pytest.mark.parametrize(
    "text",
    [
        "write a polite  email to a customer, whose parcel is late!",
        "Please write a polite email to a customer whose parcel is late",
        "Write a polite email to a customer whose order is late",
        "天気はどうですか。東京の明日の予報を教えてね",
    ],
)
def test_what_is_nearly_the_same_is_found(text: str) -> None:
    others = ["What is the capital of France?", text]
    assert nearly_among(others, ASKED) == [1]


def test_what_differs_is_not() -> None:
    others = ["Write a poem about the sea", "How do I fix a bicycle at home?", "Summarise this"]
    assert nearly_among(others, ASKED) == []


def test_what_all_prompts_share_does_not_count() -> None:
    """A system prompt and a template's header make no two questions alike."""
    around = "system You are a helpful assistant of a shop and answer briefly user {} assistant"
    ours, theirs = (
        [around.format(text) for text in texts]
        for texts in (["refund?", "the red lamp broke"], ["opening hours", "Red lamp broke, the"])
    )
    assert nearly_among(ours, theirs) == []
    assert nearly_among([ours[0], theirs[1]], theirs) == [1]


def test_ten_thousand_prompts_take_seconds() -> None:
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(2000)]
    those = [" ".join(draw.choices(vocabulary, k=40)) for _ in range(10_000)]
    these = [text.replace("word1 ", "other ") + " please" for text in those[:2000]]
    start = time.process_time()
    assert nearly_among(these, those) == list(range(2000))
    assert time.process_time() - start < 20


def _prompts(*texts: str) -> list[Prompt]:
    return [Prompt(str(i), ({"role": "user", "content": t},)) for i, t in enumerate(texts)]


def _texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[0]["content"] for prompt in prompts]


@pytest.mark.parametrize("seed", range(8))
def test_near_duplicates_stay_on_one_side_of_a_split(seed: int) -> None:
    draw = random.Random(seed)
    words = [f"word{i}" for i in range(500)]
    bases = [draw.sample(words, 20) for _ in range(12)]
    texts = [" ".join([*base[:i], f"new{i}", *base[i + 1 :]]) for base in bases for i in range(3)]
    prompts, notes = _prompts(*texts), []
    training, heldout = split_prompts(prompts, 10, seed, notes.append)
    assert notes == []
    assert len(heldout) == 9  # whole groups of three
    assert sorted([*training, *heldout], key=lambda p: int(p.id)) == prompts
    assert nearly_among(_texts(heldout), _texts(training)) == []
    assert training == sorted(training, key=lambda p: int(p.id))
    assert split_prompts(prompts, 10, seed) == (training, heldout)
    assert split_prompts(prompts, 10, seed + 1)[1] != heldout


def test_a_chain_of_near_duplicates_is_one_group() -> None:
    """The first and the last have little in common, and each with the next has much."""
    line = [f"word{i}" for i in range(30)]
    chain = _prompts(*(" ".join(line[i : i + 20]) for i in range(0, 11, 2)))
    draw = random.Random(0)
    others = _prompts(
        *(" ".join(draw.sample([f"number{i}" for i in range(900)], 9)) for _ in range(40))
    )
    sides = set()
    for seed in range(8):
        _, heldout = split_prompts([*chain, *others], 24, seed)
        sides.add(len({*_texts(heldout)} & {*_texts(chain)}))
    assert sides == {0, len(chain)}


def test_prompts_of_one_template_are_split_and_equal_ones_stay_together() -> None:
    prompts = [
        p
        for text in ("red", "green", "blue", "black")
        for p in _prompts(
            *[f"please tell me at once what it costs to send a {text} lamp by post"] * 2
        )
    ]
    notes: list[str] = []
    training, heldout = split_prompts([*prompts, *_prompts("hello")], 4, 0, notes.append)
    assert notes[0].startswith("8 of 9 prompts are nearly alike")
    with pytest.warns(UserWarning, match="8 of 9 prompts are nearly alike"):
        PromptList([*prompts, *_prompts("hello")]).split(4)
    assert len(heldout) >= 3
    assert not {*_texts(heldout)} & {*_texts(training)}
    demo = split_prompts(load_prompts("demo:train"), 64)[1]
    assert len(demo) == 64
    assert min(Counter(p.category for p in demo).values()) > 4  # each task is one large group


def test_a_split_without_two_sides_is_refused() -> None:
    for heldout in (0, 2, 3):
        with pytest.raises(InputError, match="below the number of prompts, 2; got"):
            split_prompts(_prompts("a question", "a poem"), heldout)
    with pytest.raises(InputError, match="so none can be held out"):
        split_prompts(_prompts(*["the same"] * 3), 2)


def test_a_draft_knows_what_it_was_trained_on(tmp_path: Path) -> None:
    assert read_trained(tmp_path) == frozenset()
    write_trained(tmp_path, ASKED)
    known = read_trained(tmp_path)
    assert fingerprint("how do I bake bread without YEAST, at home") in known
    assert fingerprint("How do I bake cake?") not in known
    (tmp_path / TRAINED).write_text("[1]")
    with pytest.raises(StorageError, match="is damaged"):
        read_trained(tmp_path)
