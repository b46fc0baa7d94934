"""Filters: what each removes, and how often what went is asked for again."""

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from conftest import stop_at

from specdistill.data.filters import (
    FILTERS,
    Filters,
    Judged,
    objection,
    repeated,
    repetition,
    words,
)
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import BestOf
from specdistill.data.signal import keep
from specdistill.data.token_store import Store, read_examples, read_manifest
from specdistill.decoding import GREEDY, Sampling
from specdistill.decoding.sampling import own_sampling
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel

pytestmark = pytest.mark.usefixtures("small_parts")
LENGTH = 8
WARM, FEW = Sampling(1.0), [Sampling(1.0, top_k=4)]


def ask(number: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i % 40} w{9 + i // 40}"},))
        for i in range(number)
    ]


def answer(
    target: LanguageModel, folder: Path, filters: Filters, *, more: int = 0, **changes: object
) -> tuple[Store, dict[str, list[int]]]:
    """Of 24 prompts and so many more."""
    settings = {"max_new_tokens": LENGTH, "samplings": [WARM], "seed": 3, "batch_size": 5}
    store = generate(target, ask(24 + more), folder, filters=filters, **{**settings, **changes})
    examples = read_examples(folder, signal=True) if store.manifest.parts else []
    return store, {e.id: e.response_tokens for e in examples}


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 8) == pytest.approx(4 / 5)  # five 4-grams, one kind
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("filters", "tokens", "reason"),
    [
        (Filters(min_tokens=3), [5, 0], "short"),
        (Filters(min_tokens=3), [5, 6, 0], None),
        (Filters(max_repetition=0.5), [7] * 8, "repetitive"),
        (Filters(max_repetition=0.8), [7] * 8, None),
        (Filters(truncated=True), [5, 6], "truncated"),
        (Filters(truncated=True), [5, 0], None),
        (Filters(), [7] * 80, None),
    ],
)
def test_each_filter(filters: Filters, tokens: list[int], reason: str | None) -> None:
    assert objection(filters, Judged(tokens, tokens[-1] == 0)) == reason


def test_the_first_of_equal_texts_is_no_repetition() -> None:
    assert repeated([("a", [5, 6]), ("b", [5]), ("c", [5, 6]), ("d", [5, 6])]) == {"c", "d"}


def test_words_of_text_that_came_without_tokens() -> None:
    assert words("It's 你好,\n\tfoo-bar") == ["It", "'", "s", "你", "好", ",", "foo", "-", "bar"]
    assert words(" \n") == []


def test_every_filter_has_a_test() -> None:
    assert set(FILTERS) == {"short", "repetitive", "truncated"}


def test_without_filters_nothing_is_removed(target: LanguageModel, tmp_path: Path) -> None:
    store, texts = answer(target, tmp_path / "data", Filters())
    assert len(texts) == 24
    assert store.filtered() == {"removed": {}, "regenerated": 0, "dropped": 0}


def test_what_went_is_asked_for_again_up_to_the_limit(
    target: LanguageModel, tmp_path: Path
) -> None:
    """A prompt that failed r times is answered as a run without filters would with its next
    seed; without retries it is left out.
    """
    _, plain = answer(target, tmp_path / "plain", Filters())
    bad = {i for i, text in plain.items() if text[-1] != 0}
    assert 3 < len(bad) < 22
    store, once = answer(target, tmp_path / "once", Filters(truncated=True))
    assert once == {i: text for i, text in plain.items() if i not in bad}
    assert store.filtered() == {
        "removed": {"truncated": len(bad)},
        "regenerated": 0,
        "dropped": len(bad),
    }
    store, more = answer(target, tmp_path / "more", Filters(truncated=True, retries=3))
    assert len(more) > len(once)
    assert all(text[-1] == 0 for text in more.values())
    assert all(more[i] == once[i] for i in once), "what was good the first time stays"
    counts = store.filtered()
    assert counts["regenerated"] == len(more) - len(once)
    assert counts["dropped"] == 24 - len(more)
    tries = [id_ for id_, _ in read_manifest(tmp_path / "more").removed]
    assert max(tries.count(i) for i in bad) <= 4, "the first answer and three more"
    assert all(tries.count(i) == 4 for i in bad - more.keys())
    assert counts["removed"]["truncated"] == len(tries)


def test_greedy_answers_are_not_asked_for_twice(target: LanguageModel, tmp_path: Path) -> None:
    """Of two temperatures a prompt has one by its id."""
    filters, both = Filters(truncated=True, retries=5), [GREEDY, WARM]
    _, plain = answer(target, tmp_path / "plain", Filters(), samplings=both)
    bad = [i for i, text in plain.items() if text[-1] != 0]
    store, _ = answer(target, tmp_path / "data", filters, samplings=both)
    asked = Counter(id_ for id_, _ in store.manifest.removed)
    greedy = [i for i in bad if own_sampling(both, 3, i) == GREEDY]
    assert len(greedy) > 1
    assert all(asked[i] == 1 for i in greedy)
    assert max(asked.values()) > 1


def test_no_two_answers_are_alike(target: LanguageModel, tmp_path: Path) -> None:
    short = {"max_new_tokens": 1}
    _, plain = answer(target, tmp_path / "plain", Filters(), **short)
    assert len({tuple(t) for t in plain.values()}) < len(plain)
    _, texts = answer(target, tmp_path / "data", Filters(duplicates=True, retries=4), **short)
    assert len({tuple(t) for t in texts.values()}) == len(texts)


def test_of_several_answers_each_that_goes_is_counted(
    target: LanguageModel, tmp_path: Path
) -> None:
    store, texts = answer(
        target, tmp_path / "data", Filters(truncated=True), best_of=BestOf(4, "majority")
    )
    counts = store.filtered()
    assert counts["dropped"] == 24 - len(texts) > 0
    assert counts["removed"]["truncated"] > 4 * counts["dropped"], "of prompts answered, too"
    assert counts["removed"]["truncated"] <= 4 * 24 - len(texts)
    calls = 0

    def broken(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return keep(*arguments, **options)

    many = {"filters": Filters(truncated=True), "best_of": BestOf(4, "majority")}
    with (
        mock.patch("specdistill.data.generation.keep", side_effect=broken),
        pytest.raises(KeyboardInterrupt),
    ):
        answer(target, tmp_path / "again", **many)
    store, _ = answer(target, tmp_path / "again", **many)
    assert store.filtered() == counts, "what an interrupt left unwritten is counted once"
    store, _ = answer(
        target, tmp_path / "none", Filters(min_tokens=LENGTH + 1), best_of=BestOf(4, "majority")
    )
    assert store.filtered()["removed"] == {"short": 4 * 24}


@pytest.mark.parametrize("call", [1, 3, 6])
@pytest.mark.parametrize(
    ("filters", "changes"),
    [
        (Filters(truncated=True, retries=2), {}),
        # Few texts, so that most have twins.
        (Filters(duplicates=True, retries=3), {"max_new_tokens": 1, "samplings": FEW, "more": 48}),
        (Filters(duplicates=True, truncated=True, retries=3), {"max_new_tokens": 3}),
    ],
)
def test_an_interrupted_filtered_run_goes_on_and_ends_the_same(
    target: LanguageModel, tmp_path: Path, filters: Filters, changes: dict, call: int
) -> None:
    whole, texts = answer(target, tmp_path / "whole", filters, **changes)
    assert whole.manifest.removed
    with pytest.raises(KeyboardInterrupt):
        answer(target, tmp_path / "data", filters, progress=stop_at(call), **changes)
    store, again = answer(target, tmp_path / "data", filters, **changes)
    assert again == texts
    assert store.filtered() == whole.filtered()
    assert sorted(store.manifest.removed) == sorted(whole.manifest.removed)


def test_progress_ends_at_all_prompts(target: LanguageModel, tmp_path: Path) -> None:
    told: list[float] = []

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        told.append(done)

    answer(target, tmp_path / "data", Filters(truncated=True, retries=1), progress=progress)
    assert told[-1] == 24


def test_other_filters_in_the_folder_are_refused(target: LanguageModel, tmp_path: Path) -> None:
    answer(target, tmp_path / "data", Filters(truncated=True))
    with pytest.raises(StorageError, match="other settings"):
        answer(target, tmp_path / "data", Filters(min_tokens=2))


def test_a_folder_of_removed_answers_alone_is_no_empty_one(
    target: LanguageModel, tmp_path: Path
) -> None:
    store, texts = answer(target, tmp_path / "data", Filters(min_tokens=LENGTH + 1))
    assert texts == {}
    assert store.filtered()["dropped"] == 24
    with pytest.raises(StorageError, match="other settings"):
        answer(target, tmp_path / "data", Filters(min_tokens=2))


def test_retries_without_anything_that_removes(target: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="retries: 2 has no effect"):
        answer(target, tmp_path / "data", Filters(retries=2))
    with pytest.raises(InputError, match="retries: 2 has no effect at temperature 0"):
        answer(target, tmp_path / "data", Filters(min_tokens=2, retries=2), samplings=[GREEDY])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": -1}, "min_tokens must be 0 to"),
        ({"max_repetition": 1.5}, "max_repetition must be 0 to 1"),
    ],
)
def test_filters_that_have_no_meaning(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Filters(**settings)
