"""Prompts are read whole or refused with the line that is wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_files import assistant, refusal, system, user, write_lines

from specdistill.data.prompts import Prompt, load_prompts, prompts_sha256
from specdistill.errors import InputError


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


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
        {"messages": [user("Hi") | {"name": "Ann", "weight": None}]},
        {"messages": turns},
        {"messages": [*turns, assistant("No.")]},
        {"messages": turns, "answer": "So."},
    )
    assert load_prompts(source) == [
        Prompt("1", (user("Hi") | {"name": "Ann"},)),
        Prompt("2", tuple(turns)),
        Prompt("3", tuple(turns), response="No."),
        Prompt("4", tuple(turns), response="So."),
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
    "both": ({"prompt": "y", "messages": [user("x")]}, "got 'prompt', 'messages'"),
    "prompt of another type": ({"prompt": ["x"]}, "'prompt' must be text; got list"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "blank prompt": ({"prompt": " \n\t"}, "the prompt is empty"),
    "blank user turn": ({"messages": [user(" ")]}, "the prompt is empty"),
    "messages of another type": ({"messages": "x"}, "'messages' must be a list; got str"),
    "no messages": ({"messages": []}, "do not end with a user turn"),
    "only an answer": ({"messages": [assistant("x")]}, "and stands before any other"),
    "an empty answer": (
        {"messages": [user("x"), assistant(" ")], "answer": "y"},
        "message 2 is an empty assistant turn",
    ),
    "an empty answer that is not learnt": (
        {"messages": [user("x"), assistant("", weight=0)]},
        "message 2 is an empty assistant turn",
    ),
    "half a weight": (
        {"messages": [user("x"), assistant("y", weight=0.5)]},
        "'weight' of message 2 is 0.5; it must be 0",
    ),
    "system last": ({"messages": [user("x"), system("y")]}, "do not end with a user turn"),
    "two answers in turn": (
        {"messages": [user("x"), assistant("y"), assistant("z")]},
        "message 3 has role 'assistant' and stands behind one of role 'assistant'",
    ),
    "message of another type": ({"messages": [user("x"), "y"]}, "message 2 must be an object"),
    "message without content": ({"messages": [{"role": "user"}]}, "message 1 must be an object"),
    "content of another type": (
        {"messages": [user("x"), {"role": "assistant", "content": None}]},
        "the content of message 2 must be text; got NoneType",
    ),
    "unknown role": (
        {"messages": [user("x"), {"role": "critic", "content": "y"}]},
        "message 2 has role 'critic'",
        "system, user, assistant, tool",
    ),
    "response of another type": ({"prompt": "x", "answer": 0}, "'answer' must be text; got int"),
    "id of another type": ({"prompt": "x", "id": 1.5}, "'id' must be text; got float"),
    "boolean id": ({"prompt": "x", "id": True}, "'id' must be text; got bool"),
    "category of another type": (
        {"prompt": "x", "category": 3},
        "'category' must be text; got int",
    ),
    "a key twice": ('{"prompt": "x", "prompt": "y"}', "not valid JSON", "'prompt' stands twice"),
    "a NUL": ('{"prompt": "x\0"}', "a NUL at position 14", "UTF-8, not UTF-16"),
    "a picture": ({"prompt": "x", "images": ["a.png"]}, "has 'images'", "only text"),
    "a picture in a turn": ({"messages": [user("x") | {"image": "a"}]}, "message 1 has 'image'"),
    "a part that is a picture": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}
            ]
        },
        "the content of message 1 is a list of the parts 'text', 'image'",
    ),
    "functions": ({"prompt": "x", "functions": [{"name": "f"}]}, "list them under 'tools'"),
    "earlier turns apart": (
        {"prompt": "x", "history": [["a", "b"]]},
        "earlier turns in 'messages'",
    ),
    "what the instruction is about": (
        {"prompt": "Translate.", "input": "das Haus"},
        "has 'input'",
        "write it into the prompt",
    ),
    "an answer that is begun": (
        {"messages": [user("x"), assistant("It") | {"prefix": True}]},
        "message 2 has 'prefix'",
    ),
    "tools of another type": ({"prompt": "x", "tools": {"a": 1}}, "'tools' must be a list of obj"),
    "tools that are no JSON": ({"prompt": "x", "tools": "[{"}, "'tools' is a text that is not"),
    "half a pair in tools": ('{"prompt": "x", "tools": [{"a": "\\ud83d"}]}', "half of a surrogate"),
    "settings of another type": ({"prompt": "x", "chat_template_kwargs": [1]}, "must be an object"),
    "calls of another type": (
        {"messages": [user("x"), {"role": "assistant", "tool_calls": "f()"}]},
        "'tool_calls' of message 2 must be a list",
    ),
    "a call of nothing": (
        {"messages": [user("x"), {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "a tool call of message 2 names no function",
    ),
    "a call with arguments that are no JSON": (
        {
            "messages": [
                user("x"),
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            ]
        },
        "'arguments' in message 2 is a text that is not valid JSON",
    ),
    "two system messages": (
        {"system": "a", "messages": [system("b"), user("x")]},
        "a system message in 'system' and in the messages",
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


CALL = {"function": {"name": "f", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_what_a_row_says_besides_text_stays_with_it(jsonl: Path) -> None:
    """Tools, calls, reasoning and settings of the template, in the spellings that data sets use."""
    said = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    quoted = {"function": CALL["function"] | {"arguments": '{"city": "Oslo"}'}}
    source = write_lines(
        jsonl,
        {"tools": TOOLS, "messages": [user("x"), said]},
        {"tools": json.dumps(TOOLS), "prompt": "x", "chat_template_kwargs": {"brief": True}},
        {"messages": [user("x"), said | {"tool_calls": [quoted]}, user("y")]},
        {"messages": [user("x"), assistant("a") | {"reasoning_content": "r"}], "tools": []},
        {"prompt": "x", "response": "a", "reasoning": "r", "documents": [{"text": "d"}]},
        {"prompt": "x", "system": "s", "mood": "good"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    )
    x = (user("x"),)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    found = load_prompts(source)
    assert found == [
        Prompt("1", x, None, "", {"tool_calls": [CALL]}, {"tools": TOOLS}),
        Prompt("2", x, variables={"tools": TOOLS, "brief": True}),
        Prompt("3", (*x, called, user("y"))),
        Prompt("4", x, None, "a", {"reasoning_content": "r"}),
        Prompt("5", x, None, "a", {"reasoning_content": "r"}, {"documents": [{"text": "d"}]}),
        Prompt("6", (system("s"), *x)),
        Prompt("7", x),
    ]
    assert found[5].unread == {"mood"}
    assert found[2].beside_text == ["tool_calls"]
    assert len({prompts_sha256([replace(p, id="1")]) for p in found}) == 6, "1 and 4 to 7 differ"


def test_the_hash_of_plain_prompts_is_what_it_was() -> None:
    plain = Prompt("1", (user("x"),))
    old = json.dumps([["1", [{"role": "user", "content": "x"}]]])
    assert prompts_sha256([plain]) == hashlib.sha256(old.encode()).hexdigest()


def test_several_responses_are_a_fault_only_where_one_is_needed(jsonl: Path) -> None:
    turns = [user("x"), assistant("last")]
    rows = [
        {"prompt": "x", "answer": "42", "response": "It is 42.", "gold": "6"},
        {"messages": turns, "answer": "42", "gold": "6"},
    ]
    source = write_lines(jsonl, *rows, {"prompt": "x", "answer": "42", "response": "42"})
    one, two, three = load_prompts(source)
    assert one.response is two.response is None
    assert three.one_response() == "42", "they agree"
    with pytest.raises(
        InputError, match=r"'1' \(.*, line 1\) has a response in 'response' and in 'answer'; keep"
    ):
        one.one_response()
    with pytest.raises(
        InputError, match=r"'2' \(.*, line 2\) has a response in 'answer' and in the last message"
    ):
        two.one_response()
    write_lines(jsonl, *rows)
    for column, texts in {"answer": ["42", "42"], "gold": ["6", "6"]}.items():
        chosen = load_prompts(source, response_column=column)
        assert [p.one_response() for p in chosen] == texts
    assert load_prompts(source, response_column="response", limit=1)[0].response == "It is 42."
    assert "line 1: there is no response in the last" in refusal(source, response_column="messages")
    assert "has no effect on demo:train" in refusal("demo:train", response_column="answer")


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
    assert ".jsonl, .json, .parquet or .txt" in message


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
    assert f"limit must be 1 to 1000000000; got {limit}" in refusal(source, limit=limit)


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


def test_data_set_whose_prompt_stands_in_two_columns(data_set: str) -> None:
    """Alpaca's `input` belongs under the instruction; of what else may be a part nothing is lost in
    silence.
    """
    (Path(data_set) / "test.jsonl").unlink()
    file = Path(data_set) / "train.jsonl"
    where = {"split": "train", "column": "instruction"}
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    write_lines(file, row, {**row, "input": ""})
    asked = [p.messages for p in load_prompts(data_set, **where)]
    assert asked == [(user("Add.\n1, 2"),), (user("Add."),)]
    chosen = load_prompts(data_set, **where, response_column="output")
    assert [p.response for p in chosen] == ["3", "3"]
    with pytest.raises(InputError, match="row 1: the column 'instruction' may hold a part of"):
        load_prompts(data_set, split="train", column="input")
    write_lines(file, {"question": "Who?", "context": "He came."})
    with pytest.raises(InputError, match="row 1: the column 'context' may hold a part of the pr"):
        load_prompts(data_set, split="train", column="question")
    write_lines(file, {"question": "He came. Who?", "context": "He came."})
    assert len(load_prompts(data_set, split="train", column="question")) == 1


def test_data_set_column_of_messages(data_set: str) -> None:
    folder = Path(data_set)
    write_lines(folder / "train.jsonl", *[{"chat": [user("C"), assistant("R")]}] * 2)
    (folder / "test.jsonl").unlink()
    assert load_prompts(data_set, split="train", column="chat") == [
        Prompt("1", (user("C"),), response="R"),
        Prompt("2", (user("C"),), response="R"),
    ]


def test_data_set_of_calls_and_of_two_responses(data_set: str) -> None:
    """Arrow gives every turn the keys of all, null where it has none."""
    (Path(data_set) / "test.jsonl").unlink()
    call = assistant("") | {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"chat": [user("C"), call], "tools": json.dumps(TOOLS), "answer": "4", "response": "It"}
    write_lines(Path(data_set) / "train.jsonl", *[row] * 2)
    where = {"split": "train", "column": "chat", "limit": 1}
    (prompt,) = load_prompts(data_set, **where)
    assert prompt.messages == (user("C"),)
    assert prompt.variables == {"tools": TOOLS}
    assert prompt.rivals == ("'response'", "'answer'", "the last message")
    (chosen,) = load_prompts(data_set, **where, response_column="chat")
    assert chosen.answer == {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert load_prompts(data_set, **where, response_column="answer")[0].response == "4"
    assert "has no column 'gold'" in refusal(data_set, **where, response_column="gold")


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
