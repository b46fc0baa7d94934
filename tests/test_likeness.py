"""Near duplicates are found and others are not, in bounded time; trained prompts are known."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from specdistill.data.likeness import (
    TRAINED,
    fingerprint,
    nearly_among,
    read_trained,
    write_trained,
)
from specdistill.errors import StorageError

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


def test_a_draft_knows_what_it_was_trained_on(tmp_path: Path) -> None:
    assert read_trained(tmp_path) == frozenset()
    write_trained(tmp_path, ASKED)
    known = read_trained(tmp_path)
    assert fingerprint("how do I bake bread without YEAST, at home") in known
    assert fingerprint("How do I bake cake?") not in known
    (tmp_path / TRAINED).write_text("[1]")
    with pytest.raises(StorageError, match="is damaged"):
        read_trained(tmp_path)
