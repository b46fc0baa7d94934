"""Prompts are read whole or refused with the line that is wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdistill.data.prompts import Prompt, load_prompts
from specdistill.errors import InputError


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


user, assistant, system = (partial(turn, role) for role in ("user", "assistant", "system"))


def write_lines(path: Path, *rows: object) -> str:
    """Write text as it stands and anything else as JSON, one a line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_prompts(source, **options)
    return str(caught.value)


def test_jsonl_prompts(jsonl: Path) -> None:
    source = write_lines(
        jsonl,
        {"prompt": "One", "id": "a", "category": "short", "other": [1]},
        "",
        {"prompt": " Two\n", "id": 17, "response": "Yes."},
        {"prompt": "Four", "completion": " Done", "response": None, "id": None},
        {"prompt": "Five", "answer": "", "category": None},
    )
    assert load_prompts(source) == [
        Prompt("a", (user("One"),), "short"),
        Prompt("17", (user(" Two\n"),), response="Yes."),
        Prompt("4", (user("Four"),), response=" Done"),
        Prompt("5", (user("Five"),)),
    ]


def test_jsonl_messages(jsonl: Path) -> None:
    turns = [system(""), user("Hi"), assistant("Hello."), user("And?")]
    source = write_lines(
        jsonl,
        {"messages": [user("Hi") | {"name": "Ann"}]},
        {"messages": turns},
        {"messages": [*turns, assistant("No.")]},
        {"messages": turns, "answer": "So."},
        {"messages": [*turns, assistant(" ")], "answer": "So."},
    )
    assert load_prompts(source) == [
        Prompt("1", (user("Hi"),)),
        Prompt("2", tuple(turns)),
        Prompt("3", tuple(turns), response="No."),
        Prompt("4", tuple(turns), response="So."),
        Prompt("5", tuple(turns), response="So."),
    ]


def test_text_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_bytes(b"\xef\xbb\xbf One \r\n\r\n  \nTw\xc3\xb6\nThree")
    assert load_prompts(str(path)) == [
        Prompt("1", (user(" One "),)),
        Prompt("4", (user("Twö"),)),
        Prompt("5", (user("Three"),)),
    ]


def test_jsonl_with_byte_order_mark(jsonl: Path) -> None:
    jsonl.write_bytes(b'\xef\xbb\xbf{"prompt": "One"}\r\n')
    assert load_prompts(str(jsonl)) == [Prompt("1", (user("One"),))]


@settings(deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5
    ),
    escaped=st.booleans(),
)
def test_any_text_survives_jsonl(
    texts: list[str], escaped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=escaped) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    prompts = load_prompts(str(path))
    assert [prompt.messages[0]["content"] for prompt in prompts] == texts


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_demo_workload(split: str) -> None:
    prompts = load_prompts(f"demo:{split}")
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 3
    assert all(prompt.category and prompt.messages[0]["role"] == "user" for prompt in prompts)
    assert load_prompts(f"demo:{split}", limit=3) == prompts[:3]


def test_demo_splits_share_no_prompt() -> None:
    train, heldout = (
        {prompt.messages[0]["content"] for prompt in load_prompts(f"demo:{split}")}
        for split in ("train", "heldout")
    )
    assert not train & heldout


def test_limit_reads_no_further(jsonl: Path) -> None:
    source = write_lines(jsonl, {"prompt": "One"}, {"prompt": "Two"}, "broken")
    assert [prompt.id for prompt in load_prompts(source, limit=2)] == ["1", "2"]
    assert "line 3" in refusal(source, limit=3)


BAD_ROWS = {
    "trailing comma": ('{"prompt": "x",}', "not valid JSON", "column 16"),
    "cut off": ('{"prompt": "x', "not valid JSON", "column 12"),
    "huge number": ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    "too deep": ("[" * 200_000, "not valid JSON", "recursion"),
    "a list": ([{"prompt": "x"}], "got list"),
    "a string": ('"x"', "got str"),
    "null": ("null", "got NoneType"),
    "no prompt": ({"text": "x", "id": "a"}, "one of 'prompt' and 'messages'", "got 'text', 'id'"),
    "no fields": ({}, "one of 'prompt' and 'messages'", "got no fields"),
    "both": ({"prompt": "x", "messages": [user("x")]}, "got 'prompt', 'messages'"),
    "prompt of another type": ({"prompt": ["x"]}, "'prompt' must be text; got list"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "blank prompt": ({"prompt": " \n\t"}, "the prompt is empty"),
    "blank user turn": ({"messages": [user(" ")]}, "the prompt is empty"),
    "messages of another type": ({"messages": "x"}, "'messages' must be a list; got str"),
    "no messages": ({"messages": []}, "do not end with a user turn"),
    "only an answer": ({"messages": [assistant("x")]}, "do not end with a user turn"),
    "system last": ({"messages": [user("x"), system("y")]}, "do not end with a user turn"),
    "two answers in turn": (
        {"messages": [user("x"), assistant("y"), assistant("z")]},
        "do not end with a user turn",
    ),
    "message of another type": ({"messages": [user("x"), "y"]}, "message 2 must be an object"),
    "message without content": ({"messages": [{"role": "user"}]}, "message 1 must be an object"),
    "content of another type": (
        {"messages": [user("x"), {"role": "assistant", "content": None}]},
        "the content of message 2 must be text; got NoneType",
    ),
    "unknown role": (
        {"messages": [user("x"), {"role": "tool", "content": "y"}]},
        "message 2 has role 'tool'",
        "system, user, assistant",
    ),
    "two responses": (
        {"prompt": "x", "answer": "y", "response": "z"},
        "'response' and in 'answer'",
    ),
    "response besides the last message": (
        {"messages": [user("x"), assistant("y")], "answer": "z"},
        "'answer' and in the last message",
    ),
    "response of another type": ({"prompt": "x", "answer": 0}, "'answer' must be text; got int"),
    "id of another type": ({"prompt": "x", "id": 1.5}, "'id' must be text; got float"),
    "boolean id": ({"prompt": "x", "id": True}, "'id' must be text; got bool"),
    "category of another type": (
        {"prompt": "x", "category": 3},
        "'category' must be text; got int",
    ),
    "half a surrogate pair": (r'{"prompt": "x\ud83d"}', "half of a surrogate pair at character 2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_line_is_named(name: str, jsonl: Path) -> None:
    row, *expected = BAD_ROWS[name]
    source = write_lines(jsonl, {"prompt": "fine"}, "", row, {"prompt": "also fine"})
    message = refusal(source)
    assert f"{source}, line 3: " in message
    assert all(part in message for part in expected)
    assert "line 1" not in message


def test_repeated_id_names_both_lines(jsonl: Path) -> None:
    rows = [{"prompt": "x", "id": name} for name in ("a", "b", "a")]
    message = refusal(write_lines(jsonl, *rows))
    assert f"{jsonl}, line 3: id 'a'" in message
    assert f"{jsonl}, line 1" in message


def test_given_id_may_not_be_a_later_line_number(jsonl: Path) -> None:
    message = refusal(write_lines(jsonl, {"prompt": "x", "id": 2}, {"prompt": "y"}))
    assert "line 2: id '2'" in message
    assert "line 1" in message


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_bytes_that_are_not_utf8(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n')
    message = refusal(str(path))
    assert "line 2: byte 0xe9 at position 16 is not UTF-8" in message


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_file_without_prompts(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert f"{path} holds no prompts" in refusal(str(path))


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "no folder/none", "./none", "a/b/c"])
def test_missing_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert "there is no file" in message
    assert name in message
    assert "demo:train" in message


@pytest.mark.parametrize("name", ["folder.jsonl", "folder.txt"])
def test_directory_in_place_of_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert f"{tmp_path / name} is a directory" in refusal(str(tmp_path / name))


def test_file_that_cannot_be_opened() -> None:
    assert "cannot read" in refusal("x" * 5000 + ".jsonl")


@pytest.mark.parametrize("exists", [True, False])
def test_unknown_kind_of_file(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a bare name could also be a data set's
    if exists:
        Path("prompts.csv").write_text("prompt\nx\n")
    message = refusal("prompts.csv")
    assert "prompts.csv is not a kind of prompt file" in message
    assert ".jsonl or .txt" in message


def test_no_source() -> None:
    assert "there is no file or folder ''" in refusal("")


def test_unknown_demo() -> None:
    assert "there are demo:train and demo:heldout" in refusal("demo:smollm2")


@pytest.mark.parametrize("option", ["split", "column"])
@pytest.mark.parametrize("kind", ["demo:train", "prompts.jsonl", "prompts.txt"])
def test_option_without_effect(kind: str, option: str, tmp_path: Path) -> None:
    source = kind if kind.startswith("demo:") else str(tmp_path / kind)
    assert f"{option} 'x' has no effect" in refusal(source, **{option: "x"})


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit: int, jsonl: Path) -> None:
    source = write_lines(jsonl, {"prompt": "x"})
    assert f"limit is {limit}" in refusal(source, limit=limit)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with the splits train and test, as `datasets` reads them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {
            "id": "same",
            "question": f"Q{number}",
            "chat": [user(f"C{number}"), assistant(f"R{number}")],
            "answer": number,
            "response": f"A{number}",
            "category": "sums" if number else None,
        }
        for number in range(3)
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", *rows)
    return str(folder)


def test_data_set_column_of_text(data_set: str) -> None:
    assert load_prompts(data_set, split="test", column="question", limit=2) == [
        Prompt("1", (user("Q0"),), response="A0"),
        Prompt("2", (user("Q1"),), "sums", "A1"),
    ]


def test_data_set_column_that_could_be_a_response(data_set: str) -> None:
    prompts = load_prompts(data_set, split="train", column="response", limit=1)
    assert prompts == [Prompt("1", (user("A0"),))]


def test_data_set_column_of_messages(data_set: str) -> None:
    folder = Path(data_set)
    write_lines(folder / "train.jsonl", *[{"chat": [user("C"), assistant("R")]}] * 2)
    (folder / "test.jsonl").unlink()
    assert load_prompts(data_set, split="train", column="chat") == [
        Prompt("1", (user("C"),), response="R"),
        Prompt("2", (user("C"),), response="R"),
    ]


def test_data_set_needs_split_and_column(data_set: str) -> None:
    message = refusal(data_set, column="question")
    assert "needs a split; it has train, test" in message
    message = refusal(data_set, split="train")
    assert "needs the column" in message
    assert "question, chat, answer" in message


def test_data_set_without_that_split_or_column(data_set: str) -> None:
    message = refusal(data_set, split="dev", column="question")
    assert "dev" in message
    assert "train" in message
    message = refusal(data_set, split="train", column="prompt")
    assert "no column 'prompt'" in message
    assert "question, chat, answer" in message


def test_data_set_column_of_another_type(data_set: str) -> None:
    message = refusal(data_set, split="train", column="answer")
    assert "column answer, row 1: 'prompt' must be text; got int" in message


def test_folder_without_data(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    assert "as a data set" in refusal(str(folder), split="train", column="x")


def test_data_set_that_cannot_be_found() -> None:
    message = refusal("nobody/such-prompts", split="train", column="x")
    assert "cannot load 'nobody/such-prompts'" in message
    assert ".jsonl" in message
