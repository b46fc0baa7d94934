"""A cheaper model that answers in the target's place: how often it may, and what is kept."""

from pathlib import Path

import pytest
import torch
from test_cli import run
from test_scorers import PROMPTS, WARM, answer, mean_log_probability

from specdistill import models
from specdistill.cli import parsing
from specdistill.data.scorers import BestOf, matched_number
from specdistill.data.token_store import read_manifest
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel


@pytest.fixture(scope="module")
def small(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the target's first layer."""
    folder = tmp_path_factory.mktemp("writer") / "small"
    save_draft(make_draft(target, [0]), folder)
    return folder


@pytest.fixture(scope="module")
def writer(small: Path) -> LanguageModel:
    return models.load(str(small), dtype="float64")


@pytest.mark.parametrize(
    ("number", "ratio", "matched"), [(1, 9.5, 9), (4, 2.5, 10), (3, 1.1, 3), (1, 1.9, 1)]
)
def test_answers_of_equal_cost(number: int, ratio: float, matched: int) -> None:
    assert matched_number(number, ratio) == matched


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_a_generator_that_is_no_cheaper(ratio: float) -> None:
    with pytest.raises(InputError, match="it is no cheaper"):
        matched_number(8, ratio)


def test_how_cost_is_written() -> None:
    assert parsing.match("compute") == "compute"
    assert parsing.match("cost:9.5") == 9.5
    for wrong in ("cost", "cost:", "cost:-1", "price:2", "cost:x"):
        with pytest.raises(InputError, match="--match must be compute, or cost:X"):
            parsing.match(wrong)


def test_the_texts_are_the_writers_and_the_signal_the_targets(
    target: LanguageModel, writer: LanguageModel, tmp_path: Path
) -> None:
    choice = BestOf(3, "log-probability")
    store, ours = answer(target, tmp_path / "data", choice, writer=writer)
    _, own = answer(writer, tmp_path / "own", choice)
    assert ours.keys() == own.keys() == {p.id for p in PROMPTS}
    for i, example in ours.items():
        assert example.response_tokens == own[i].response_tokens
        stock = target.model(torch.tensor([example.prompt_tokens + example.response_tokens])).logits
        assert example.signal is not None
        ours_logits = target.logits(example.signal.hidden)
        expected = stock[0, len(example.prompt_tokens) - 1 : -1]
        assert torch.allclose(ours_logits, expected, atol=1e-5)
        lse = example.signal.logsumexp.to(expected.dtype)
        assert torch.allclose(lse, expected.logsumexp(-1), atol=1e-5)
    assert store.manifest.settings["writer"] == [writer.name, writer.sha256()]
    assert store.manifest.target_sha256 == target.sha256()
    better = sum(mean_log_probability(writer, e) for e in ours.values())
    _, single = answer(target, tmp_path / "one", writer=writer)
    assert better > sum(mean_log_probability(writer, e) for e in single.values())


def test_answers_of_another_writer_do_not_mix(
    target: LanguageModel, writer: LanguageModel, tmp_path: Path
) -> None:
    answer(target, tmp_path / "data", writer=writer)
    with pytest.raises(StorageError, match="with other settings"):
        answer(target, tmp_path / "data")


def test_a_trimmed_writer_is_refused(target: LanguageModel, tmp_path: Path) -> None:
    trimmed = make_draft(target, [0], torch.arange(0, 64, 2))
    with pytest.raises(InputError, match="trimmed vocabulary, so it cannot write all"):
        answer(target, tmp_path / "data", writer=trimmed)


def test_the_command(tiny_folder: Path, small: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w5 w6\nw7 w8\n")
    asked = ["generate", "--target", tiny_folder, "--prompts", prompts, "--threads", 1]
    asked += ["--max-new-tokens", 5, "--temperature", WARM.temperature, "--json"]
    asked += ["--dtype", "float64"]
    choice = ["--generator", small, "--best-of", 2, "--scorer", "majority", "--match"]
    ratio = models.load(str(tiny_folder)).parameters() / models.load(str(small)).parameters()
    done = run(*asked, "--out", tmp_path / "compute", *choice, "compute")
    assert done.document["answers"] == 2
    number = int(2 * ratio)
    assert number > 2
    assert f"{number} answers of {small} for 2 of the target's" in done.err
    settings = read_manifest(tmp_path / "compute").settings
    assert settings["best_of"] == {"number": number, "scorer": "majority"}
    done = run(*asked, "--out", tmp_path / "price", *choice, "cost:4")
    assert read_manifest(tmp_path / "price").settings["best_of"]["number"] == 8
    for wrong in (choice[:2], [*choice[:2], *choice[-1:], "compute"], ["--match", "compute"]):
        done = run(*asked, "--out", tmp_path / "x", *wrong)
        assert (done.code, "go together" in done.err) == (2, True)
    done = run(*asked, "--out", tmp_path / "x", "--generator", tiny_folder, *choice[2:], "compute")
    assert (done.code, "no cheaper" in done.err) == (2, True)
    assert not (tmp_path / "x").exists()
