"""Conversations as they are: the usual data sets are read as they stand, turn by turn."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from chat_templates import DROPS_REASONING, END, MISTRAL, QWEN3, TEMPLATES
from conftest import CHAT, tiny_model
from prompt_files import assistant, refusal, system, tool, user
from prompt_files import write_lines as write
from pyarrow import parquet
from small_runs import make_world, settings
from small_runs import run as train
from test_chat import byte_tokenizer
from test_cli import Done, run
from transformers import PreTrainedTokenizerFast

from specdistill import models
from specdistill.data.chat import PROBE, encode_example, encode_prompt
from specdistill.data.generation import generate
from specdistill.data.likeness import split_prompts
from specdistill.data.messages import checked_messages, said_beside
from specdistill.data.prompts import Prompt, load_prompts, turns_of
from specdistill.data.rewriting import rewriting
from specdistill.data.settings import distinct, settings_of
from specdistill.data.sources import TextAnswers
from specdistill.data.templates import DATE
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel, origin
from specdistill.scoring import measure
from specdistill.scoring.comparable import obstacles
from specdistill.scoring.headline import settings_line
from specdistill.scoring.scorecard import Scorecard
from specdistill.training.answers import (
    heldout_and_training,
    read_given,
    rewritten_turns,
    split,
    template_settings,
)

ARGUMENTS = {"city": "Oslo", "days": 2}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def call(arguments: object = ARGUMENTS) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


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
    "an empty last turn": (
        {"data": ["a", "b", "c", ""]},
        "message 4 is an empty assistant turn",
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


@pytest.mark.parametrize(
    ("row", "both"),
    [
        (FORMS["openai"] | FORMS["sharegpt"], "'messages' and in 'conversations'"),
        (FORMS["sharegpt"] | FORMS["ultrachat"], "'conversations' and in 'data'"),
        ({"prompt": "Hi"} | FORMS["ultrachat"], "'prompt' and in 'data'"),
    ],
)
def test_a_row_of_two_kinds(row: dict[str, Any], both: str, tmp_path: Path) -> None:
    source = write(tmp_path / "talk.jsonl", row)
    assert f"{source}, line 1: got a conversation in {both}; keep one" in refusal(source)
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "talk.parquet")
    assert f"row 1: got a conversation in {both}" in refusal(str(tmp_path / "talk.parquet"))


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


# Every assistant turn, in every template


def conversation(*turns: dict[str, Any], **more: Any) -> list[Prompt]:
    *before, last = turns
    prompt = Prompt("c", tuple(before), response=last["content"], answer=said_beside(last))
    return turns_of(replace(prompt, **more))


def example(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, **options: Any
) -> tuple[list[int], int]:
    """The tokens, and how many of them are given."""
    assert prompt.response is not None
    tokens, mask = encode_example(tokenizer, prompt, prompt.response, **options)
    start = mask.index(True)
    assert mask == [False] * start + [True] * (len(mask) - start)
    return tokens, start


def marked(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, Any]], **more: Any
) -> tuple[list[int], list[bool]]:
    """The tokens of messages, and which of them the template's own tags say are the model's."""
    both = tokenizer.apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True, **DAY, **more
    )
    return both["input_ids"], list(map(bool, both["assistant_masks"]))


DAY = {"date_string": DATE.strftime("%d %b %Y")}  # what Llama 3 is told in place of today
TALK = [
    user("Hi"),
    assistant("Hello there."),
    user("And you?"),
    assistant("Two\nlines."),
    user("Bye"),
    assistant("See you."),
]


def bare(template: str) -> str:
    """The template without its tags."""
    return re.sub("(%-? )generation ", r"\1if true ", template).replace("endgeneration", "endif")


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "bare"])
@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"qwen3"}))
def test_the_spans_of_all_turns_are_what_the_templates_tags_mark(name: str, tagged: bool) -> None:
    """Side by side they are the mask of the whole conversation; the tags play no part."""
    tokenizer = byte_tokenizer(TEMPLATES[name])
    whole, marks = marked(tokenizer, TALK)
    if not tagged:
        tokenizer.chat_template = bare(TEMPLATES[name])
    spans = [False] * len(whole)
    turns = conversation(*TALK)
    assert [turn.id for turn in turns] == ["c#1", "c#2", "c#3"]
    for number, prompt in enumerate(turns):
        tokens, start = example(tokenizer, prompt)
        asked = TALK[: 2 * number + 1]
        assert tokens[:start] == tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False, **DAY
        )
        assert tokens == whole[: len(tokens)]
        said, lead = TALK[2 * number + 1]["content"], " " if name == "mistral" else ""
        assert tokenizer.decode(tokens[start:]) == lead + said + END.get(name, "<|im_end|>")
        spans[start : len(tokens)] = [True] * (len(tokens) - start)
    assert spans == marks
    assert rewriting(tokenizer, turns) == ""


MARKERS = "".join(sorted({*END.values(), "<|im_end|>"}))
HEADERS = (
    "a<|im_start|>assistant\nb<start_of_turn>model\nc<|start_header_id|>assistant<|end_header_id|>"
)
ODD = {
    "white space": [user("Hi  "), assistant(" \n One. \n"), user("\nx\n"), assistant("\n\ny\r\n")],
    "markers in a question": [
        user(f"a{MARKERS}\nb"),
        assistant("One."),
        user(HEADERS),
        assistant("y"),
    ],
    "headers in an answer": [user("x"), assistant(HEADERS), user("y"), assistant("fine")],
    "the same text": [user("same"), assistant("same"), user("same"), assistant("same")],
    "the header's text": [user("x"), assistant("assistant"), user("y"), assistant("model\nbot: z")],
    "the probe": [user(PROBE), assistant(f"{PROBE} {PROBE}"), user(PROBE), assistant(PROBE)],
    "a template's words": [
        user("{% if %}"),
        assistant("{{ x }}{% endgeneration %}"),
        user("{#"),
        assistant("#}"),
    ],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_masks_of_odd_texts_are_what_the_tags_mark(name: str, odd: str) -> None:
    """Text for text; the tokens of a prompt are those that are decoded from."""
    tokenizer = byte_tokenizer(TEMPLATES[name])
    for number, prompt in enumerate(conversation(*ODD[odd])):
        tokens, start = example(tokenizer, prompt)
        asked = encode_prompt(tokenizer, prompt)
        assert tokens[: len(asked)] == asked
        whole, marks = marked(tokenizer, ODD[odd][: 2 * number + 2])
        last = len(marks) - 1 - marks[::-1].index(True)
        first = last - marks[last::-1].index(False) + 1
        assert tokenizer.decode(whole).startswith(tokenizer.decode(tokens))
        tagged, spoken = tokenizer.decode(whole[first : last + 1]), tokenizer.decode(tokens[start:])
        assert tagged.endswith(spoken)
        # A token of two line breaks may stand across the tag.
        given = "<think>\n\n</think>" if name == "qwen3" else ""
        assert tagged.removesuffix(spoken).strip() == given


THOUGHT = [
    user("Hi"),
    assistant("Hello there.", reasoning_content="Greet."),
    user("And you?"),
    assistant("Well.", reasoning_content="Be brief."),
]


def test_each_turn_of_a_template_that_drops_reasoning_is_learnt_with_its_own() -> None:
    """The last turn of what has been said so far has its thought, earlier ones have lost theirs."""
    tokenizer = byte_tokenizer(QWEN3)
    turns = conversation(*THOUGHT)
    for number, prompt in enumerate(turns):
        tokens, start = example(tokenizer, prompt)
        whole, marks = marked(tokenizer, THOUGHT[: 2 * number + 2])
        assert tokens == whole[: len(tokens)]
        last = len(marks) - 1 - marks[::-1].index(True)
        assert (start, len(tokens)) == (last - marks[last::-1].index(False) + 1, last + 1)
    given, spoken = tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:])
    assert spoken == "<think>\nBe brief.\n</think>\n\nWell.<|im_end|>"
    assert "Hello there." in given
    assert "Greet." not in given
    assert "rewrites earlier turns in 1 of 1 conversations" in rewriting(tokenizer, turns)
    as_text = [
        user("Hi"),
        assistant("<think>\nGreet.\n</think>\n\nHello there."),
        user("And you?"),
        assistant("<think>\nBe brief.\n</think>\n\nWell."),
    ]
    assert [example(tokenizer, p) for p in conversation(*as_text)] == [
        example(tokenizer, p) for p in turns
    ]


def test_reasoning_of_the_steps_between_tools_stays_until_the_next_question() -> None:
    tokenizer = byte_tokenizer(QWEN3)
    looked = assistant("", reasoning_content="Look.", tool_calls=[call()])
    talk = [user("Warm?"), looked, tool("21"), assistant("Yes.", reasoning_content="It is.")]
    calling, telling = conversation(*talk, variables={"tools": TOOLS})
    tokens, start = example(tokenizer, calling)
    assert tokenizer.decode(tokens[start:]) == (
        '<think>\nLook.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Oslo", "days": 2}}\n</tool_call><|im_end|>'
    )
    tokens, start = example(tokenizer, telling)
    given = tokenizer.decode(tokens[:start])
    assert "Look." in given
    assert "<tool_response>\n21\n</tool_response><|im_end|>" in given
    assert tokenizer.decode(tokens[start:]) == "<think>\nIt is.\n</think>\n\nYes.<|im_end|>"
    assert rewriting(tokenizer, [calling, telling]) == ""
    more = conversation(*talk, user("Sure?"), assistant("Sure."), variables={"tools": TOOLS})
    tokens, start = example(tokenizer, more[-1])
    assert "Look." not in tokenizer.decode(tokens[:start])
    assert rewriting(tokenizer, more)


@pytest.mark.parametrize("thinking", [True, False, None])
def test_without_reasoning_an_empty_thought_is_given_and_not_learnt(thinking: bool | None) -> None:
    """Of words and of calls alike; whether the generation prompt has it already or not."""
    tokenizer = byte_tokenizer(QWEN3)
    settings = {} if thinking is None else {"enable_thinking": thinking}
    talk = [user("Hi"), assistant("", tool_calls=[call()]), tool("21"), assistant("Warm.")]
    for prompt in conversation(*talk, variables={"tools": TOOLS, **settings}):
        tokens, start = example(tokenizer, prompt)
        assert tokenizer.decode(tokens[:start]).endswith("assistant\n<think>\n\n</think>\n\n")
        assert tokenizer.decode(tokens[start:]).startswith(("Warm.", "<tool_call>"))
    (thought,) = conversation(*THOUGHT[:2], variables={"enable_thinking": False})
    with pytest.raises(InputError, match="renders the prompt in another way once an answer"):
        example(tokenizer, thought)


def test_a_template_that_always_thinks_and_shows_no_reasoning_is_refused() -> None:
    tokenizer = byte_tokenizer(DROPS_REASONING)
    for words in ("Hello.", "Greet.</think>Hello."):
        prompt = replace(conversation(user("Hi"), assistant(words))[0], where="talk.jsonl, line 7")
        with pytest.raises(InputError, match=r"'c' \(talk.jsonl, line 7\): .* in another way"):
            example(tokenizer, prompt)


CALLS = {
    "llama3": (
        '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}<|eot_id|>',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"21"<|eot_id|>',
    ),
    "qwen25": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n'
        "</tool_call><|im_end|>",
        "<|im_start|>user\n<tool_response>\n21\n</tool_response><|im_end|>",
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]</s>',
        '[TOOL_RESULTS] "21"[/TOOL_RESULTS]',
    ),
}


CALLING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls %}<call>WRITTEN</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
AS_JSON = '{"city": "Oslo", "days": 2}'


@pytest.mark.parametrize("given", [ARGUMENTS, AS_JSON], ids=["object", "text"])
@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("{{ c.function.arguments | tojson }}", AS_JSON),
        ("{{ c.function | tojson }}", f'{{"name": "weather", "arguments": {AS_JSON}}}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}: {{ v }};{% endfor %}", None),
        ("{{ c.function.name + '(' + c.function.arguments + ')' }}", f"weather({AS_JSON})"),
        ("{{ c.function.arguments }}", AS_JSON),
        ("{{ c.function.name ~ ' ' ~ c.function.arguments }}", f"weather {AS_JSON}"),
        ("{{ c.function.arguments.city ~ (c.function.arguments['days'] + 1) }}", "Oslo3"),
    ],
)
def test_arguments_are_what_the_template_can_write(
    written: str, seen: str | None, given: object
) -> None:
    """As an object, or as the text of its JSON, whichever form the row has."""
    tokenizer = byte_tokenizer(CALLING.replace("WRITTEN", written))
    talk = [user("Warm?"), assistant("", tool_calls=[call(given)]), tool("21"), assistant("Yes.")]
    calling, telling = conversation(*checked_messages(talk, "talk.jsonl, line 1"))
    spoken = seen or "city: Oslo;days: 2;"
    tokens, start = example(tokenizer, calling)
    assert tokenizer.decode(tokens[start:]) == f"<call>{spoken}</call><|im_end|>"
    tokens, start = example(tokenizer, telling)
    assert f"<call>{spoken}</call>" in tokenizer.decode(tokens[:start])


def test_arguments_that_no_form_fits_are_refused_for_the_usual_one() -> None:
    written = (
        "{{ raise_exception('no ' ~ ('text' if c.function.arguments is string else 'call')) }}"
    )
    tokenizer = byte_tokenizer(CALLING.replace("WRITTEN", written))
    talk = [user("Warm?"), assistant("", tool_calls=[call()]), tool("21"), assistant("Yes.")]
    with pytest.raises(InputError, match="chat template refuses these messages: no call"):
        example(tokenizer, conversation(*talk)[1])


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_learnt_and_results_are_given(name: str) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name])
    asked = assistant("", tool_calls=[call() | {"id": "abcdefghi"}])
    talk = [user("Warm?"), asked, tool("21", tool_call_id="abcdefghi"), assistant("Yes.")]
    spoken, shown = CALLS[name]
    calling, telling = conversation(*talk, variables={"tools": TOOLS})
    tokens, start = example(tokenizer, calling)
    assert tokenizer.decode(tokens[start:]) == spoken
    whole, marks = marked(tokenizer, talk[:2], tools=TOOLS)
    assert (tokens, marks.index(True)) == (whole[: len(tokens)], start)
    tokens, start = example(tokenizer, telling)
    given = tokenizer.decode(tokens[:start])
    assert spoken + ("\n" if name == "qwen25" else "") + shown in given
    assert json.dumps(TOOLS) in given
    assert tokenizer.decode(tokens[start:]).strip().startswith("Yes.")


def test_tools_that_wander_to_the_last_question_rewrite_earlier_turns() -> None:
    tokenizer = byte_tokenizer(MISTRAL)
    turns = conversation(*TALK, variables={"tools": TOOLS})
    assert rewriting(tokenizer, turns)
    for prompt in turns:
        tokens, start = example(tokenizer, prompt)
        given = tokenizer.decode(tokens[:start])
        assert given.count("[AVAILABLE_TOOLS]") == 1
        assert given.endswith(f"[/AVAILABLE_TOOLS][INST] {prompt.messages[-1]['content']}[/INST]")


# From a file to answers and examples


def test_all_turns_of_a_file_or_its_ends(tmp_path: Path) -> None:
    asked = [user("Hi"), assistant("Hello."), user("And?")]
    source = write(
        tmp_path / "talk.jsonl",
        {"messages": [system("s"), *asked, assistant("Fine.")], "id": "a", "category": "k"},
        {"messages": asked, "system": "s"},
        {"messages": [user("Hi"), assistant("Hello."), user("x"), assistant("y", weight=0)]},
        {"messages": [user("Hi"), assistant("Hello.", weight=0), user("x"), assistant("y")]},
        {"messages": [user("Hi"), assistant("Hello.")]},
    )
    turns = load_prompts(source, turns="all")
    assert [(t.id, t.conversation, t.response) for t in turns] == [
        ("a#1", "a", "Hello."),
        ("a#2", "a", "Fine."),
        ("2#1", "2", "Hello."),
        ("2#2", "2", None),
        ("3#1", "3", "Hello."),
        ("3#2", "3", None),
        ("4#2", "4", "y"),
        ("5", None, "Hello."),
    ]
    assert turns[0].messages == turns[2].messages == (system("s"), user("Hi"))
    assert turns[0].category == "k"
    assert turns[1].where == f"{source}, line 1, answer 2"
    assert [p.id for p in load_prompts(source)] == ["a", "2", "3", "4", "5"]
    assert [t.id for t in load_prompts(source, turns="all", limit=1)] == ["a#1", "a#2"]
    learnt = TextAnswers(source, generated=False).answers("all")
    assert [answer.prompt.id for answer in learnt] == ["a#1", "a#2", "2#1", "3#1", "4#2", "5"]


def test_ids_of_turns_may_not_be_other_lines(tmp_path: Path) -> None:
    row = FORMS["openai"]
    source = write(tmp_path / "talk.jsonl", {**row, "id": "a"}, {**row, "id": "a#1"})
    assert [p.id for p in load_prompts(source)] == ["a", "a#1"]
    source = write(tmp_path / "b.jsonl", {**row, "id": "a"}, {"messages": [user("x")], "id": "a#2"})
    assert "line 2: id 'a#2' was already used in" in refusal(source, turns="all")


def test_a_conversation_is_held_out_whole() -> None:
    examples = [
        Example(f"{c}#{t}", [1] * t + [c + 5], [2], conversation=str(c))
        for c in range(30)
        for t in range(1, 4)
    ]
    examples += [Example("x", [1, 5], [3]), Example("y", [9], [3])]  # asks what 0#1 does
    heldout, training = split(examples, 16)
    assert 16 <= len(heldout) <= 18
    assert not {e.conversation for e in heldout} & {e.conversation for e in training} - {None}
    side = heldout if any(e.id == "x" for e in heldout) else training
    assert "0#1" in {e.id for e in side}
    assert split(examples[::-1], 16) == (heldout, training)


def test_a_split_of_prompts_cuts_no_conversation(tmp_path: Path) -> None:
    texts = [[f"{w} {c}" for w in ("apple", "bread", "cloud", "dream")] for c in range(20)]
    source = write(tmp_path / "talk.jsonl", *({"data": row} for row in texts))
    for seed in range(4):
        sides = split_prompts(load_prompts(source, turns="all"), 8, seed)
        train, heldout = ({p.conversation for p in side} for side in sides)
        assert heldout
        assert not train & heldout


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def talks(number: int) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [
                said("human", words(5 + i)),
                said("gpt", words(6 + i, 7)),
                said("human", words(8, 9 + i)),
                said("gpt", words(10, 11)),
            ]
        }
        for i in range(number)
    ]


def test_generate_answers_every_turn_anew_or_the_last(
    target: LanguageModel, tmp_path: Path
) -> None:
    source = write(tmp_path / "talk.jsonl", *talks(3))
    by_id: dict[str, Example] = {}
    for turns in ("all", "last"):
        asked = load_prompts(source, turns=turns)
        folder = tmp_path / turns
        generate(target, asked, folder, max_new_tokens=6)
        examples = read_examples(folder, signal=True)
        for example in examples:
            prompt = next(p for p in asked if p.id == example.id)
            assert example.prompt_tokens == encode_prompt(target.tokenizer, prompt)
            assert example.conversation == prompt.conversation
        by_id |= {f"{turns} {e.id}": e for e in examples}
    assert sorted(by_id) == [
        *(f"all {c}#{t}" for c in (1, 2, 3) for t in (1, 2)),
        *(f"last {c}" for c in (1, 2, 3)),
    ]
    for c in (1, 2, 3):
        again, last = by_id[f"all {c}#2"], by_id[f"last {c}"]
        assert again.prompt_tokens == last.prompt_tokens
        assert again.response_tokens == last.response_tokens
        given = target.tokenizer.decode(again.prompt_tokens)
        assert words(5 + c, 7) in given, "the turn before is the conversation's own"


def test_all_turns_are_trained(tiny_folder: Path, tmp_path: Path) -> None:
    target = models.load(str(tiny_folder))
    save_draft(make_draft(target, [0, 1]), tmp_path / "draft")
    source = write(tmp_path / "talk.jsonl", *talks(12))
    world = {"target": str(tiny_folder), "draft": str(tmp_path / "draft"), "data": source}
    for turns, number in (("all", 24), ("last", 12)):
        config = settings(world, tmp_path / turns, policy="fixed", turns=turns, decode=None)
        heldout, training = heldout_and_training(config, target, target)
        assert len(heldout) + len(training) == number
    rows = train(settings(world, tmp_path / "run", policy="fixed", turns="all", decode=None))
    assert rows[-2]["loss"] < rows[1]["loss"]
    assert rewritten_turns(config, target) == ""


def test_turns_that_have_no_effect(tiny_folder: Path, tmp_path: Path) -> None:
    world = make_world(tmp_path, tiny_folder)
    config = settings(world, tmp_path / "run", turns="all")
    with pytest.raises(InputError, match=r"turns: all has no effect on .*data, whose answers were"):
        heldout_and_training(config, models.load(world["target"]), models.load(world["draft"]))


def test_a_conversation_longer_than_the_model(target: LanguageModel, tmp_path: Path) -> None:
    """Named by its line before any answer is made, where it is asked and where it is learnt."""
    long = {"data": [words(5), words(6), words(*[7] * 600), words(8)]}
    source = write(tmp_path / "talk.jsonl", {"data": [words(5), words(6)]}, long)
    with pytest.raises(InputError) as caught:
        generate(target, load_prompts(source), tmp_path / "new", max_new_tokens=6)
    assert f"prompt '2' ({source}, line 2) has 60" in str(caught.value)
    assert "reads 512 positions" in str(caught.value)
    assert not (tmp_path / "new").exists()
    world = {"target": "t", "draft": "d", "data": source}
    config = settings(world, tmp_path / "run", policy="fixed", turns="all", heldout=1)
    with pytest.raises(InputError, match=r"^prompt '2#2' \(.*line 2, answer 2\) comes to 61"):
        read_given(config, target)
    reads_more = tiny_model(max_position_embeddings=1024)
    with pytest.raises(InputError, match=r"line 2, answer 2\) comes to 61.* reads 512 positions"):
        heldout_and_training(config, reads_more, target)


# What templates are told


def test_settings_of_a_run_and_of_a_line(tmp_path: Path) -> None:
    source = write(
        tmp_path / "talk.jsonl",
        {"prompt": "x"},
        {"prompt": "x", "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": "x", "tools": TOOLS},
    )
    told = {"enable_thinking": False}
    prompts = load_prompts(source, chat_template_kwargs=told)
    assert [p.variables for p in prompts] == [
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"enable_thinking": False, "tools": TOOLS},
    ]
    tokenizer = byte_tokenizer(QWEN3)
    asked = [tokenizer.decode(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    assert [text.endswith("</think>\n\n") for text in asked] == [True, False, True]
    assert distinct(map(settings_of, prompts)) == [told, {"enable_thinking": True}]
    dated = load_prompts(source, limit=1, chat_template_kwargs={"date_string": "3 May 2030"})
    llama = byte_tokenizer(TEMPLATES["llama3"])
    assert "Today: 3 May 2030" in llama.decode(encode_prompt(llama, dated[0]))
    with pytest.raises(InputError, match="leaves out 'date_string'"):
        encode_prompt(tokenizer, dated[0])


def cli(command: str) -> Done:
    return run(*shlex.split(command))


MOODY = "{% if mood %}w{{ mood }} {% endif %}" + CHAT


@pytest.fixture
def moody(tmp_path: Path) -> str:
    """The folder of a target whose template reads a setting."""
    folder = tmp_path / "target"
    model = tiny_model(layers=3)
    model.tokenizer.chat_template = MOODY
    save_draft(model, folder)
    return str(folder)


def test_a_draft_is_scored_as_it_was_trained_or_the_score_says_so(
    moody: str, tmp_path: Path
) -> None:
    """From the answers' manifest to the run, the draft, the card, and what is said of it."""
    world, made = tmp_path, models.load(moody, dtype="float32")
    source = write(world / "asked.jsonl", *({"prompt": words(i, i + 1)} for i in range(5, 17)))
    tell = shlex.quote('{"mood": 7}')
    generate_ = f"generate --target {moody} --prompts {source} --max-new-tokens 6"
    assert cli(f"{generate_} --out {world / 'data'} --chat-template-kwargs {tell}").code == 0
    assert read_manifest(world / "data").chat_template_kwargs == [{"mood": 7}]
    again = cli(f"{generate_} --out {world / 'data'}")
    assert again.code == 2, "other prompts, as far as the template goes"
    save_draft(make_draft(made, [0]), world / "draft")
    base = {"target": moody, "draft": str(world / "draft"), "data": str(world / "data")}
    config = settings(base, world / "run", decode=None, heldout=2)
    with pytest.raises(InputError, match=r"chat_template_kwargs has no effect on .*data"):
        read_given(settings(base, world / "run", chat_template_kwargs={"mood": 8}), made)
    train(config)
    draft = models.load(str(world / "run/draft"), dtype="float32")
    assert origin(draft)["chat_template_kwargs"] == [{"mood": 7}]

    score = f"score --target {moody} --draft {world / 'run/draft'} --prompts {source} --limit 2"
    score += " --max-new-tokens 4 --num-draft-tokens 1 --temperature 0 --json"
    same = cli(f"{score} --out {world / 'same.json'}")
    assert same.document["provenance"]["chat_template_kwargs"] == [{"mood": 7}]
    assert 'is told {"mood": 7} for 2 of 2 prompts, as in the draft\'s training' in same.err
    assert "in training" not in same.err.replace("in the draft's training", "")
    tell = shlex.quote('{"mood": 8}')
    other = cli(f"{score} --out {world / 'other.json'} --chat-template-kwargs {tell}")
    assert 'was told {"mood": 8} here, and in training {"mood": 7}' in other.err
    card = measure.score(
        made,
        draft,
        load_prompts(source, limit=1),
        num_draft_tokens=1,
        temperature=0.0,
        max_new_tokens=4,
    )
    assert card.provenance["chat_template_kwargs"] == [{"mood": 7}]
    assert settings_line(card) == ""


FORGETS = CHAT.replace(
    "m['content']", "m['content'].split()[-1] if loop.revindex0 else m['content']"
)


def test_every_turn_of_a_conversation_is_scored_or_the_last(tmp_path: Path) -> None:
    """By a target whose template leaves the last word alone of earlier turns."""
    source = write(tmp_path / "talk.jsonl", *talks(2))
    target = tiny_model(layers=3)
    target.tokenizer.chat_template = FORGETS
    save_draft(target, tmp_path / "target")
    save_draft(make_draft(target, [0]), tmp_path / "draft")
    score = f"score --target {tmp_path / 'target'} --draft {tmp_path / 'draft'}"
    score += f" --prompts {source} --json"
    score += " --max-new-tokens 4 --num-draft-tokens 1 --temperature 0"
    cards = {}
    for turns in ("last", "all"):
        out = tmp_path / f"{turns}.json"
        done = cli(f"{score} --turns {turns} --out {out}")
        assert done.document["provenance"]["conversation_turns"] == turns
        cards[turns] = Scorecard.read(out)
        noted = "rewrites earlier turns in 2 of 2 conversations" in done.err
        assert noted == (turns == "all")
    rows = {row.prompt_id: row for row in cards["all"].per_prompt}
    assert list(rows) == ["1#1", "1#2", "2#1", "2#2"]
    prompts = {prompt.id: prompt for prompt in load_prompts(source, turns="all")}
    for id_, row in rows.items():
        assert row.prompt_tokens == len(encode_prompt(target.tokenizer, prompts[id_]))
    last = {row.prompt_id: row for row in cards["last"].per_prompt}
    assert list(last) == ["1", "2"]
    assert [row.accepted for row in last.values()] == [rows[f"{c}#2"].accepted for c in (1, 2)]
    reasons = obstacles(cards)
    assert "turns of a conversation differs: last in last, all in all" in reasons


def test_text_is_learnt_with_the_settings_of_the_configuration(moody: str, tmp_path: Path) -> None:
    source = write(tmp_path / "talk.jsonl", *talks(6))
    base = {"target": moody, "draft": "d", "data": source, "policy": "fixed", "turns": "all"}
    config = settings(base, tmp_path / "run", chat_template_kwargs={"mood": 9})
    target = models.load(moody)
    examples = read_given(config, target)
    assert len(examples) == 12
    assert all(target.tokenizer.decode(e.prompt_tokens).startswith("w9 ") for e in examples)
    assert template_settings(config) == [{"mood": 9}]


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a": 1, "a": 2}', "mood=7"])
def test_settings_that_are_no_object(text: str, tmp_path: Path) -> None:
    source = write(tmp_path / "asked.jsonl", {"prompt": "x"})
    command = f"generate --target t --prompts {source} --out {tmp_path / 'new'}"
    done = cli(f"{command} --chat-template-kwargs {shlex.quote(text)}")
    assert done.code == 2
    assert "--chat-template-kwargs: " in done.err
