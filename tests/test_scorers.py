"""Best of N: what each scorer prefers, a user's own function, and what the engine keeps of it."""

import math
from pathlib import Path

import pytest
import torch
from test_cli import run

from specdistill.data.filters import NO_FILTER, Filters
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import SCORERS, BestOf, Candidate, best, final_answer, find_scorer
from specdistill.data.token_store import Example, Store, read_examples, read_manifest
from specdistill.decoding import GREEDY, Sampling
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel

pytestmark = pytest.mark.usefixtures("small_parts")
LENGTH = 6
WARM = Sampling(1.0)
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w9"},)) for i in range(14)]
ASKED = Prompt("a", ({"role": "user", "content": "6 times 7?"},), response="so\n#### 42")


def said(*texts: str) -> list[Candidate]:
    return [Candidate(text) for text in texts]


# Scorers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("6 times 7 is 42.\n#### 42", "42"),
        ("Answer: 41? No.\nAnswer: 42", "42"),
        ("The final answer is 1,234,567.", "1234567"),
        (r"thus \boxed{x^2}", "x^2"),
        (r"thus \boxed{\frac{x^{2}}{3}}.", r"\frac{x^{2}}{3}"),
        ("**Answer:** Paris.", "paris"),
        ("answer: $1,200.50", "1200.50"),
        ("  New   York ", "new york"),
        ("1,2 and 3", "1,2 and 3"),
        ("I cannot answer that.", "i cannot answer that"),
        ("", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_log_probability_is_as_given() -> None:
    candidates = [Candidate("a", -2.0), Candidate("b", -1.0), Candidate("c", -1.5)]
    assert best(ASKED, candidates, SCORERS["log-probability"]) == 1


def test_exact_match_keeps_the_first_right_one_or_none() -> None:
    right = SCORERS["exact-match"]
    assert best(ASKED, said("Answer: 41", "the answer is 42.", "#### 42"), right) == 1
    assert best(ASKED, said("Answer: 41", "42 is not it"), right) is None
    with pytest.raises(InputError, match="prompt 'p0' has no answer of its own"):
        best(PROMPTS[0], said("x"), right)


def test_the_majority_is_of_final_answers() -> None:
    voted = SCORERS["majority"]
    assert best(ASKED, said("Answer: 1", "so\n#### 2", "Answer: 2", "Answer: 3"), voted) == 1
    assert best(ASKED, said("Answer: 1", "Answer: 2"), voted) == 0, "the first of equals"


def test_every_scorer_has_a_test() -> None:
    assert set(SCORERS) == {"log-probability", "exact-match", "majority"}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module of the user's in the working directory."""
    name = f"scorers_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "import math\n"
        "def longest(prompt, answers):\n"
        "    assert prompt.messages[-1]['role'] == 'user'\n"
        "    return [len(answer) for answer in answers]\n"
        "def none(prompt, answers): return [-math.inf] * len(answers)\n"
        "def too_few(prompt, answers): return [1.0]\n"
        "def nan(prompt, answers): return [math.nan] * len(answers)\n"
        "def words(prompt, answers): return ['good'] * len(answers)\n"
        "def broken(prompt, answers): return 1 / 0\n"
        "number = 7\n"
    )
    (tmp_path / f"{name}_bad.py").write_text("import nothing_of_that_name\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_function_of_the_users_own(mine: str) -> None:
    import sys

    before = list(sys.path)
    scorer = find_scorer(f"{mine}:longest")
    assert sys.path == before
    assert best(ASKED, said("a", "abc", "ab"), scorer) == 1
    assert best(ASKED, said("a", "b"), find_scorer(f"{mine}:none")) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", r"gave \[1.0\] for the 2 answers to prompt 'a'"),
        ("nan", "must give a number for each"),
        ("words", "failed on prompt 'a': ValueError: could not convert"),
        ("broken", "failed on prompt 'a': ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_users_function_does_wrong_is_told(mine: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        best(ASKED, said("a", "b"), find_scorer(f"{mine}:{function}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "unknown scorer 'best'; choose from log-probability, exact-match, majority"),
        (":f", "unknown scorer"),
        ("MINE:", "unknown scorer"),
        ("no_such_module:f", "cannot be had: ModuleNotFoundError.*working directory"),
        ("MINE:absent", "cannot be had: AttributeError"),
        ("MINE_bad:f", "cannot be had: ModuleNotFoundError: No module named 'nothing_of"),
        ("MINE:number", "is no function but int"),
    ],
)
def test_scorers_that_are_not_there(mine: str, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_scorer(name.replace("MINE", mine))


def test_the_command_takes_the_users_function(mine: str, tiny_folder: Path) -> None:
    Path("prompts.txt").write_text("w5 w6\nw7 w8\n")
    asked = ["generate", "--target", tiny_folder, "--prompts", "prompts.txt", "--threads", 1]
    asked += ["--max-new-tokens", 5, "--temperature", 1, "--signal", "none", "--json"]
    choice = ["--best-of", 3, "--scorer"]
    done = run(*asked, "--out", "data", *choice, f"{mine}:longest")
    assert done.document["answers"] == 2
    assert "removed: none" in done.err
    assert read_manifest(Path("data")).settings["best_of"]["scorer"] == f"{mine}:longest"
    done = run(*asked, "--out", "none", *choice, f"{mine}:none")
    assert done.code == 2
    assert "removed: 6 scorer; 0 prompts answered in another way, 2 without" in done.err
    assert "no answer is left in none; loosen what removes them" in done.err
    for wrong in (choice[:2], ["--scorer", "majority"]):
        done = run(*asked, "--out", "x", *wrong)
        assert (done.code, "go together" in done.err) == (2, True)


# What the engine keeps


def answer(
    target: LanguageModel, folder: Path, best_of: BestOf | None = None, **changes: object
) -> tuple[Store, dict[str, Example]]:
    settings = {"max_new_tokens": LENGTH, "samplings": [WARM], "seed": 3, "batch_size": 5}
    settings |= {"prompts": PROMPTS, **changes}
    store = generate(target, folder=folder, best_of=best_of, **settings)  # type: ignore[arg-type]
    signal = settings.get("signal") != "none"
    examples = read_examples(folder, signal=signal) if store.manifest.parts else []
    return store, {e.id: e for e in examples}


def mean_log_probability(target: LanguageModel, example: Example) -> float:
    """By the stock model, at temperature 1."""
    tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
    rows = target.model(tokens).logits[0, len(example.prompt_tokens) - 1 : -1].log_softmax(-1)
    own = rows.gather(-1, torch.tensor(example.response_tokens)[:, None])
    return own.mean().item()


def test_the_likeliest_of_several_is_kept_with_its_own_signal(
    target: LanguageModel, tmp_path: Path
) -> None:
    _, single = answer(target, tmp_path / "one")
    cool = [Sampling(1.5)]
    _, few = answer(target, tmp_path / "3", BestOf(3, "log-probability"), samplings=cool)
    _, many = answer(target, tmp_path / "9", BestOf(9, "log-probability"), samplings=cool)
    _, plain = answer(target, tmp_path / "1", samplings=cool)
    assert plain.keys() == few.keys() == many.keys() == single.keys()
    means = [{i: mean_log_probability(target, e) for i, e in s.items()} for s in (plain, few, many)]
    for i in plain:  # the first answer is the single one's, and three are the first of nine
        assert means[0][i] <= means[1][i] + 1e-9
        assert means[1][i] <= means[2][i] + 1e-9
    assert sum(means[0].values()) < sum(means[1].values()) < sum(means[2].values())
    for example in many.values():
        stock = target.model(torch.tensor([example.prompt_tokens + example.response_tokens])).logits
        assert example.signal is not None
        ours = target.logits(example.signal.hidden)
        assert torch.allclose(ours, stock[0, len(example.prompt_tokens) - 1 : -1], atol=1e-5)


def test_a_scorer_sees_all_answers_in_order_whatever_the_batch(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}

    def second(prompt: Prompt, candidates: list[Candidate]) -> list[float]:
        again = seen.setdefault(prompt.id, [c.text for c in candidates])
        assert again == [c.text for c in candidates]
        return [0.0, 1.0, 0.0, 0.0]

    monkeypatch.setitem(SCORERS, "second", second)
    _, one = answer(target, tmp_path / "a", BestOf(4, "second"), batch_size=3)
    _, other = answer(target, tmp_path / "b", BestOf(4, "second"), batch_size=64, signal="none")
    assert len(seen) == 14
    assert all(len(set(texts)) > 1 for texts in seen.values())
    for i, example in one.items():
        assert (
            target.tokenizer.decode(example.response_tokens, skip_special_tokens=True) == seen[i][1]
        )
        assert other[i].response_tokens == example.response_tokens


def test_filters_go_before_the_scorer(target: LanguageModel, tmp_path: Path) -> None:
    """Truncated answers do not compete, however likely."""
    whole = Filters(truncated=True)
    _, few = answer(target, tmp_path / "1", filters=whole)
    _, many = answer(target, tmp_path / "8", BestOf(8, "log-probability"), filters=whole)
    assert len(few) < len(many)
    assert all(e.response_tokens[-1] == 0 for e in many.values())


def test_none_that_matches_is_asked_again_and_counted(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(prompt: Prompt, candidates: list[Candidate]) -> list[float]:
        return [0.0 if "w5" in c.text else -math.inf for c in candidates]

    monkeypatch.setitem(SCORERS, "ends", ends)
    store, once = answer(target, tmp_path / "once", BestOf(2, "ends"))
    again, more = answer(target, tmp_path / "more", BestOf(2, "ends"), filters=Filters(retries=4))
    assert 0 < len(once) < len(more) <= 14
    assert all(more[i].response_tokens == once[i].response_tokens for i in once)
    assert store.filtered()["removed"] == {"scorer": 2 * (14 - len(once))}
    assert again.filtered()["regenerated"] == len(more) - len(once)


@pytest.mark.parametrize("call", [2, 9, 20])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    target: LanguageModel, tmp_path: Path, call: int
) -> None:
    _, whole = answer(target, tmp_path / "whole", BestOf(3, "log-probability"))
    told: list[float] = []

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        told.append(done)
        if len(told) == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(target, tmp_path / "data", BestOf(3, "log-probability"), progress=progress)
    _, again = answer(target, tmp_path / "data", BestOf(3, "log-probability"), progress=progress)
    assert {i: e.response_tokens for i, e in again.items()} == {
        i: e.response_tokens for i, e in whole.items()
    }
    assert told[-1] == 14
    assert max(told) == 14


def test_the_folder_says_how_it_was_chosen(target: LanguageModel, tmp_path: Path) -> None:
    answer(target, tmp_path / "data", BestOf(3, "majority"))
    settings = read_manifest(tmp_path / "data").settings
    assert settings["best_of"] == {"number": 3, "scorer": "majority"}
    for other in (BestOf(2, "majority"), BestOf(3, "log-probability"), None):
        with pytest.raises(StorageError, match="other settings"):
            answer(target, tmp_path / "data", other)


def test_what_has_no_effect_is_refused(target: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="best_of must be 1 to 1024; got 0"):
        BestOf(0, "majority")
    with pytest.raises(InputError, match="'majority' has no effect on a single answer"):
        BestOf(1, "majority")
    with pytest.raises(InputError, match="3 answers at temperature 0 are one and the same"):
        answer(target, tmp_path / "data", BestOf(3, "majority"), samplings=[WARM, GREEDY])
    with pytest.raises(InputError, match="unknown scorer"):
        answer(target, tmp_path / "data", BestOf(3, "x"), filters=NO_FILTER)
    with pytest.raises(InputError, match="prompt 'p0' has no answer of its own"):
        answer(target, tmp_path / "data", BestOf(3, "exact-match"))
    assert not (tmp_path / "data").exists(), "before any work"
