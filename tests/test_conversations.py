"""Conversations as they are: the usual data sets are read as they stand, turn by turn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from specdistill.data.prompts import Prompt, load_prompts
from specdistill.errors import InputError


def turn(role: str, text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


user, assistant, system, tool = (
    partial(turn, role) for role in ("user", "assistant", "system", "tool")
)
ARGUMENTS = {"city": "Oslo", "days": 2}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call(arguments: object = ARGUMENTS) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_prompts(source, **options)
    return str(caught.value)


HELLO = Prompt("1", (user("Hi"), assistant("Hello."), user("And?")), response="Fine.")
FORMS: dict[str, dict[str, Any]] = {
    "sharegpt": {
        "conversations": [
            said("human", "Hi"),
            said("gpt", "Hello."),
            said("human", "And?") | {"weight": None},
            said("gpt", "Fine."),
        ]
    },
    "openai": {
        "messages": [user("Hi"), assistant("Hello."), user("And?"), assistant("Fine.")],
        "parallel_tool_calls": False,
    },
    "roles in ShareGPT's place": {
        "conversations": [user("Hi"), assistant("Hello."), user("And?"), assistant("Fine.")]
    },
    "ultrachat": {"data": ["Hi", "Hello.", "And?", "Fine."]},
    "ultrachat 200k": {
        "prompt": "Hi",
        "prompt_id": "f0e1",
        "messages": [user("Hi"), assistant("Hello."), user("And?"), assistant("Fine.")],
    },
    "ultrachat as messages": {
        "data": [user("Hi"), assistant("Hello."), user("And?"), assistant("Fine.")]
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_the_usual_files_load_as_they_are(form: str, suffix: str, tmp_path: Path) -> None:
    rows, file = [FORMS[form], FORMS[form]], tmp_path / f"talk.{suffix}"
    if suffix == "jsonl":
        write(file, *rows)
    elif suffix == "json":
        file.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist(rows), file)
    first, second = load_prompts(str(file))
    assert (first.messages, first.response) == (HELLO.messages, HELLO.response)
    assert first.messages == second.messages
    assert first.where == f"{file}, {({'jsonl': 'line', 'json': 'entry'}).get(suffix, 'row')} 1"


def test_calls_and_results_in_each_form_are_the_same(tmp_path: Path) -> None:
    """Arguments as an object or a text of JSON, ShareGPT's calls, and Parquet's rows."""
    openai = [
        user("Warm?"),
        assistant(None, tool_calls=[call()]),
        tool("21", tool_call_id="c1"),
        assistant("Yes."),
    ]
    quoted = [openai[0], assistant("", tool_calls=[call(json.dumps(ARGUMENTS))]), *openai[2:]]
    sharegpt = [
        said("human", "Warm?"),
        said("function_call", json.dumps(call()["function"])),
        said("observation", "21"),
        said("gpt", "Yes."),
    ]
    as_lines = load_prompts(
        write(
            tmp_path / "a.jsonl",
            {"messages": openai, "tools": TOOLS},
            {"messages": quoted, "tools": json.dumps(TOOLS)},
        )
    )
    table = pa.Table.from_pylist([{"messages": openai, "tools": TOOLS}])
    parquet.write_table(table, tmp_path / "a.parquet")
    expected = (user("Warm?"), assistant("", tool_calls=[call()]), tool("21", tool_call_id="c1"))
    for prompt in (*as_lines, *load_prompts(str(tmp_path / "a.parquet"))):
        assert (prompt.messages, prompt.response) == (expected, "Yes.")
        assert prompt.variables == {"tools": TOOLS}
    (other,) = load_prompts(write(tmp_path / "b.jsonl", {"conversations": sharegpt}))
    assert other.messages[1]["tool_calls"] == [call()["function"]]
    assert other.messages[2] == tool("21")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an answer first": (
        {"messages": [assistant("Hello."), user("Hi")]},
        "message 1 has role 'assistant' and stands before any other",
    ),
    "an answer behind the system": (
        {"messages": [system("s"), assistant("Hello."), user("Hi")]},
        "message 2 has role 'assistant' and stands behind one of role 'system'",
    ),
    "two answers in turn": (
        {"messages": [user("a"), assistant("b"), assistant("c"), user("d")]},
        "message 3 has role 'assistant' and stands behind one of role 'assistant'",
    ),
    "a result without a call": (
        {"messages": [user("a"), tool("21"), user("b")]},
        "message 2 has role 'tool' and stands behind one of role 'user'",
    ),
    "a result behind words": (
        {"messages": [user("a"), assistant("b"), tool("21")]},
        "message 3 has role 'tool' and stands behind one of role 'assistant'",
    ),
    "an empty turn": (
        {"messages": [user("a"), assistant(" \n"), user("b")]},
        "message 2 is an empty assistant turn",
    ),
    "a stranger": (
        {"conversations": [said("human", "a"), said("critic", "b")]},
        "message 2 is from 'critic'; known are system, human,",
    ),
    "a call that is no JSON": (
        {"conversations": [said("human", "a"), said("function_call", "f(")]},
        "the call in message 2 is not valid JSON",
    ),
    "arguments that are a list": (
        {"messages": [user("a"), assistant("", tool_calls=[call([1])])]},
        "'arguments' in message 2 must be an object; got list",
    ),
    "a value of another type": (
        {"conversations": [{"from": "human", "value": 3}]},
        "the content of message 1 must be text; got int",
    ),
    "a turn that is none": (
        {"conversations": [said("human", "a"), "b"]},
        "message 2 must be an object",
    ),
    "no list": ({"conversations": "a"}, "'conversations' must be a list of turns; got str"),
    "texts and messages": ({"data": ["a", user("b")]}, "message 1 must be an object"),
    "nothing said": ({"data": []}, "do not end with a user turn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_is_not_understood_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    row, reason = BAD[name]
    (form,) = row
    good = {form: FORMS["ultrachat as messages"]["data"]}
    source = write(tmp_path / "talk.jsonl", good, row, good)
    message = refusal(source)
    assert message.startswith(f"{source}, line 2: ")
    assert reason in message


def test_kinds_that_are_mixed_in_one_file(tmp_path: Path) -> None:
    source = write(tmp_path / "talk.jsonl", FORMS["openai"], FORMS["openai"], FORMS["sharegpt"])
    message = refusal(source)
    assert f"{source}, line 3 has its conversation in 'conversations'" in message
    assert f"{source}, line 1 in 'messages'" in message
    assert len(load_prompts(source, limit=2)) == 2


def test_files_that_are_no_list_or_no_parquet(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    for text, reason in (
        ('{"data": []}', "must be a list of objects"),
        ('[{"data": ["a"]},\n\n 3]', "entry 2: the file must be a list"),
        ('[\n\n{"data": ["a"],}]', "not valid JSON"),
        ("[\n\n{'a'}]", "at column 2 of line 3"),
        ("[]", "holds no prompts"),
        ("", "holds no prompts"),
    ):
        file.write_text(text)
        assert reason in refusal(str(file))
        assert str(file) in refusal(str(file))
    (tmp_path / "talk.parquet").write_text("PAR1")
    assert "talk.parquet as Parquet" in refusal(str(tmp_path / "talk.parquet"))
    assert "there is no file" in refusal(str(tmp_path / "none.parquet"))
    assert "has no effect on" in refusal(str(tmp_path / "none.parquet"), split="train")
