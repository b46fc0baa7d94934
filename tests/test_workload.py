"""The shipped prompts: enough of them, always the same, and nothing of the held-out ones in
training.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from specdistill.data.demo import _ENTITIES, SIZES, TASKS, Split, workload

KINDS = ("first", "last", "product", "town")
SPLITS: tuple[tuple[Split, Split], ...] = (("train", "heldout"), ("heldout", "train"))


def texts(split: Split) -> list[str]:
    return [row["prompt"] for row in workload(split)]


def used(text: str, entities: list[str]) -> set[str]:
    return {name for name in entities if re.search(rf"\b{re.escape(name)}\b", text)}


def test_there_are_enough_prompts() -> None:
    for split in SIZES:
        assert len(workload(split)) == SIZES[split]
    assert sum(SIZES.values()) >= 600
    assert SIZES["heldout"] >= 50


def test_prompts_and_ids_are_unique_over_both_splits() -> None:
    rows = [*workload("train"), *workload("heldout")]
    for field in ("prompt", "id"):
        repeated = [value for value, n in Counter(row[field] for row in rows).items() if n > 1]
        assert not repeated


@pytest.mark.parametrize("split", SIZES)
def test_every_category_is_there_in_equal_parts(split: Split) -> None:
    counts = Counter(row["category"] for row in workload(split))
    assert set(counts) == set(TASKS)
    assert max(counts.values()) - min(counts.values()) <= 1
    for row in workload(split):
        assert row["prompt"].startswith(TASKS[row["category"]])


@pytest.mark.parametrize("split", SIZES)
def test_every_prompt_names_its_entities_and_leaves_no_gap(split: Split) -> None:
    for text in texts(split):
        assert "{" not in text
        assert "}" not in text
        assert len(re.findall(r"\b\d{5}\b", text)) == 1
        for kind in ("first", "last", "product"):
            assert used(text, _ENTITIES[split][kind]), (kind, text)


@pytest.mark.parametrize(("split", "other"), SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_names_an_entity_of_the_other_split(
    split: Split, other: Split, kind: str
) -> None:
    foreign = _ENTITIES[other][kind]
    assert any(used(text, foreign) for text in texts(other)), "the search must be able to find one"
    for text in texts(split):
        assert not used(text, foreign), text


def test_no_order_number_is_in_both_splits() -> None:
    train, heldout = (
        {number for text in texts(split) for number in re.findall(r"\d+", text)} for split in SIZES
    )
    assert len(train) == SIZES["train"]
    assert len(heldout) == SIZES["heldout"]
    assert not train & heldout


def test_the_prompts_are_the_same_in_every_process() -> None:
    code = (
        "import hashlib, json\n"
        "from specdistill.data.demo import workload\n"
        "rows = [workload('train'), workload('heldout')]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    ours = json.dumps([workload("train"), workload("heldout")])
    hashes = {hashlib.sha256(ours.encode()).hexdigest()}
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1
