"""Prompts that the target writes: what is kept, what falls away, and how a stopped run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import run

from specdistill.data import widening
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.widening import TRIES, Widening, widen
from specdistill.errors import InputError, StorageError
from specdistill.files import write_whole
from specdistill.models import LanguageModel

SEEDS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w9 w{20 + i}"},)) for i in range(9)
]


def asked(**settings: Any) -> Widening:
    return Widening(**{"count": 12, "shots": 3, "max_new_tokens": 20, **settings})


def test_the_target_writes_prompts_that_are_new(
    tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    target, file = tiny(3), tmp_path / "more.jsonl"
    found = widen(target, SEEDS, file, asked(), batch_size=8)
    assert len(found.prompts) == 12
    assert found.removed.keys() <= {"truncated", "length", "similar"}
    assert [p.messages for p in load_prompts(str(file))] == [p.messages for p in found.prompts]
    texts = [p.messages[-1]["content"] for p in [*SEEDS, *found.prompts]]
    assert len(set(texts)) == len(texts)
    again = widen(target, SEEDS, tmp_path / "other.jsonl", asked(), batch_size=8)
    assert again == found
    others = widen(target, SEEDS, tmp_path / "seed.jsonl", asked(seed=1), batch_size=8)
    assert others.prompts != found.prompts


@pytest.mark.parametrize(
    ("text", "whole", "fault"),
    [
        ("write a poem about snow", True, None),
        ("write a poem about snow", False, "truncated"),
        ("write poems", True, "length"),
        ("so " * 151, True, "length"),
        ("Write a short letter to Ann now", True, "similar"),  # 6 of 6 and 7 words: 12 / 13
        ("write a letter about the cold snow", True, None),  # 3 of 6 and 7 words: 6 / 13
    ],
)
def test_why_a_text_is_not_kept(text: str, whole: bool, fault: str | None) -> None:
    known = ["something else altogether", "write a short letter to ann"]
    assert widening._fault(text, whole, known, 0.7) == fault


def test_labels_and_quotation_marks_are_no_part_of_a_prompt() -> None:
    assert widening._cleaned(' Request: "Do this now." \n') == "Do this now."


def scripted(texts: list[tuple[str, bool]], calls: list[list[int]]) -> Callable[..., Any]:
    """In the place of the target: draft i is text i, again from the first after the last."""

    def drafted(decoder: Any, target: Any, known: Any, numbers: Any, plan: Any) -> Any:
        calls.append(list(numbers))
        assert all(text in known for text in ("w5 w9 w20", "w13 w9 w28"))
        return [texts[number % len(texts)] for number in numbers]

    return drafted


def test_what_falls_away_is_counted_and_ends(
    tiny: Callable[..., LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []
    texts = [("one new text", True), ("w5 w9 w20", True), ("cut off here", False), ("no", True)]
    monkeypatch.setattr(widening, "_drafted", scripted(texts, calls))
    found = widen(tiny(3), SEEDS, tmp_path / "more.jsonl", asked(count=3), batch_size=8)
    assert [p.messages[-1]["content"] for p in found.prompts] == ["one new text"]
    assert calls[-1][-1] == TRIES * 3 - 1, "it gives up"
    tried = [number % 4 for number in range(TRIES * 3)]
    wanted = {"similar": tried.count(0) - 1 + tried.count(1)}
    wanted |= {"truncated": tried.count(2), "length": tried.count(3)}
    assert found.removed == wanted


def test_a_stopped_run_goes_on_and_ends_the_same(
    tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    target, plan = tiny(3), asked(count=20)
    whole = widen(target, SEEDS, tmp_path / "whole.jsonl", plan, batch_size=4)

    class Stop(Exception):
        pass

    def stop(stage: str, done: float, total: float, detail: str = "") -> None:
        if done >= 9:
            raise Stop

    file = tmp_path / "more.jsonl"
    with pytest.raises(Stop):
        widen(target, SEEDS, file, plan, batch_size=4, progress=stop)
    kept = len(load_prompts(str(file)))
    assert 9 <= kept < 20
    with file.open("a") as half:  # killed between the two files
        half.write(json.dumps({"id": "written-9999", "prompt": "never reached"}) + "\n")
    assert widen(target, SEEDS, file, plan, batch_size=4) == whole
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    again = widen(target, SEEDS, file, plan, batch_size=4)
    assert again == whole


@pytest.mark.parametrize("writes", [1, 2, 3])
def test_a_run_killed_after_any_of_its_first_writes_goes_on(
    tiny: Callable[..., LanguageModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    class Killed(BaseException):
        pass

    left = writes

    def write(path: Path, text: str) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        write_whole(path, text)

    target, file = tiny(3), tmp_path / "more.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(widening, "write_whole", write)
        with pytest.raises(Killed):
            widen(target, SEEDS, file, asked(), batch_size=4)
    found = widen(target, SEEDS, file, asked(), batch_size=4)
    assert found == widen(target, SEEDS, tmp_path / "whole.jsonl", asked(), batch_size=4)


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"shots": 4}, {"max_similarity": 0.5}, {"count": 13}]
)
def test_another_run_in_the_same_file_is_refused(
    tiny: Callable[..., LanguageModel], tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "more.jsonl"
    widen(tiny(3), SEEDS, file, asked(), batch_size=8)
    before = file.read_bytes()
    with pytest.raises(StorageError, match="with another settings"):
        widen(tiny(3), SEEDS, file, asked(**change), batch_size=8)
    assert file.read_bytes() == before


def test_a_file_of_the_users_own_is_not_touched(
    tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "mine"}\n')
    with pytest.raises(StorageError, match="is not of `widen`"):
        widen(tiny(3), SEEDS, file, asked())
    assert file.read_text() == '{"prompt": "mine"}\n'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be 1 to .*; got 0"),
        ({"max_similarity": 0.0}, "above 0 and at most 1"),
        ({"temperature": 0.0}, "temperature must be .*; got 0.0"),
        ({"shots": 10}, "10 examples are to be shown, and there are 9 prompts"),
    ],
)
def test_settings_that_cannot_be(
    tiny: Callable[..., LanguageModel], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        widen(tiny(3), SEEDS, tmp_path / "more.jsonl", asked(**settings))


def test_an_example_that_leaves_no_room_is_named(
    tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    long = Prompt("long", ({"role": "user", "content": "w7 " * 600},))
    with pytest.raises(InputError, match=r"reads 512 positions; show fewer .* as 'w7 w7"):
        widen(tiny(3), [long, *SEEDS[:2]], tmp_path / "more.jsonl", asked())


def test_the_command(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "prompts.txt", tmp_path / "more.jsonl"
    source.write_text("\n".join(p.messages[-1]["content"] for p in SEEDS))
    options = ["--prompts", source, "--out", out, "--shots", 3, "--max-new-tokens", 20]
    done = run("widen", "--target", tiny_folder, *options, "--count", 5, "--threads", 1, "--json")
    assert done.document["prompts"] == len(load_prompts(str(out)))
    assert f"prompts in {out}" in done.err.replace("\n", "")
    refused = run("widen", "--target", tiny_folder, *options, "--count", 6, "--threads", 1)
    assert refused.code == 2
    assert "name another file" in refused.err
