"""Prompts as every command takes them, read and checked row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specdistill import limits
from specdistill.data.messages import (
    BESIDE_TEXT,
    check_order,
    checked_messages,
    in_one_form,
    refuse_unreadable,
    said_beside,
    text_of,
)
from specdistill.data.rows import (
    REASONING,
    RESPONSE_FIELDS,
    SYSTEM_FIELDS,
    TEMPLATE_SETTINGS,
    VARIABLES,
    Row,
    open_rows,
    parsed,
)
from specdistill.errors import InputError

Turns = Literal["last", "all"]  # of a conversation


def named(id_: str, where: str) -> str:
    """A prompt and where it stands, as a message begins."""
    return f"prompt {id_!r}" + (f" ({where})" if where else "")


@dataclass(frozen=True)
class Prompt:
    """What the models are asked: chat messages that end with a user's turn or a tool's result.

    `messages` hold "role", "content" and whatever else the source says of a turn; a bare prompt is
    one user message. `response` is the data set's own answer where it gives one, and `answer` what
    that has besides text, as in `BESIDE_TEXT`. `variables` are given to the chat template: tools,
    documents, settings.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    category: str | None = None
    response: str | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    rivals: tuple[str, ...] = field(default=(), compare=False)  # several responses, none chosen
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # the row's other fields
    where: str = field(default="", compare=False)  # it stands, for messages
    conversation: str | None = field(default=None, compare=False)  # of whose turns it is one

    @property
    def named(self) -> str:
        return named(self.id, self.where)

    def one_response(self) -> str | None:
        """The response; None where there is none. Raises `InputError` where there are several."""
        if self.rivals:
            raise InputError(
                f"{self.named} has a response in {' and in '.join(self.rivals)}; keep one, "
                "or choose by --response-column where the command has it"
            )
        return self.response

    @property
    def beside_text(self) -> list[str]:
        """Names of what it holds that no plain text can say."""
        keys = {key for turn in self.messages for key in turn if key in BESIDE_TEXT}
        return [*self.variables, *sorted(keys)]


def load_prompts(
    source: str,
    *,
    split: str | None = None,
    column: str | None = None,
    response_column: str | None = None,
    limit: int | None = None,
    turns: Turns = "last",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Read the prompts of `source`, or of the first `limit` of its lines. Of a conversation each
    assistant turn is one with `turns` "all", see `turns_of`, and else its end alone. All of them
    give the chat template `chat_template_kwargs`, where a line has no other value of its own.

    `source` is `demo:train` or `demo:heldout`; a `.jsonl` file with {"prompt": ...} or a
    conversation a line, as in `messages.py`; a `.json` file with a list of them, or a `.parquet`
    file with them as rows; a `.txt` file with a prompt a line; or a `datasets` id or folder, which
    needs `split` and `column` (of text or of messages). A line may have "id", "category",
    "system", "tools", "documents", "chat_template_kwargs" and a response: the last assistant
    message or one of `RESPONSE_FIELDS`. Where there are several that differ, `response_column`
    names the one that is meant, or any other field; else none is taken, and `Prompt.one_response`
    refuses. Ids are line numbers from 1 where the source gives none, and always row numbers for
    `datasets`.

    Raises:
        InputError: an unusable source, option or line; the message names the line.
    """
    if limit is not None:
        limits.check("limit", limit, limits.COUNT)
    prompts: list[Prompt] = []
    first_use: dict[str, str] = {}
    rows = open_rows(source, split, column, response_column)
    known: tuple[str, str] | None = None  # the form of the rows so far, and where the first stands
    for row in itertools.islice(rows, limit):
        where = row.where
        form, fields = in_one_form(row.fields, where)
        known = known or (form, where)
        if form != known[0]:
            raise InputError(
                f"{where} has its conversation in {form!r}, and {known[1]} in {known[0]!r}; give "
                "files of one kind each"
            )
        whole = _prompt(replace(row, fields=fields))
        if chat_template_kwargs:
            whole = replace(whole, variables={**chat_template_kwargs, **whole.variables})
        for prompt in turns_of(whole) if turns == "all" else [whole]:
            if prompt.id in first_use:
                raise InputError(
                    f"{where}: id {prompt.id!r} was already used in {first_use[prompt.id]}; ids "
                    "must be unique, and a line without an id takes its line number"
                )
            first_use[prompt.id] = where
            prompts.append(prompt)
    if not prompts:
        raise InputError(f"{source} holds no prompts; it needs at least one")
    return prompts


def turns_of(prompt: Prompt) -> list[Prompt]:
    """A prompt for each assistant turn, with that turn as its response, and for the end of the
    conversation; where they are several, their ids are the conversation's with # and a number. A
    turn of weight 0, OpenAI's mark of what is not to be learnt, is left out.

    What stands before a turn is its prompt, which is what a server sees when it is to write it. So
    a template that shows earlier turns in another way than they were written is followed by
    construction.
    """
    answers = [place for place, turn in enumerate(prompt.messages) if turn["role"] == "assistant"]
    if not answers:
        return [prompt]
    turns = [
        replace(
            prompt,
            messages=prompt.messages[:place],
            response=prompt.messages[place]["content"],
            answer=said_beside(prompt.messages[place]),
            rivals=(),
        )
        for place in answers
    ]
    learnt = [prompt.messages[place].get("weight") != 0 for place in answers]
    return [
        replace(
            turn,
            id=f"{prompt.id}#{number}",
            where=f"{prompt.where}, answer {number}" if prompt.where else "",
            conversation=prompt.id,
        )
        for number, (turn, wanted) in enumerate(
            zip([*turns, prompt], [*learnt, True], strict=True), 1
        )
        if wanted
    ]


def as_prompt(asked: str | Sequence[Mapping[str, Any]], number: int = 1) -> Prompt:
    """A text, which becomes one user message, or chat messages that end with a user turn. Raises
    `InputError` for what is neither.
    """
    field_ = "prompt" if isinstance(asked, str) else "messages"
    asked = list(asked) if isinstance(asked, tuple) else asked
    return replace(_prompt(Row(f"prompt {number}", number, {field_: asked})), where="")


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Hash of what is asked, in its order."""
    asked = [
        [p.id, list(p.messages), *([dict(p.variables)] if p.variables else [])] for p in prompts
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _prompt(given: Row) -> Prompt:
    row, where = given.fields, given.where
    if ("prompt" in row) == ("messages" in row):
        fields = ", ".join(map(repr, row)) or "no fields"
        raise InputError(f"{where}: give one of 'prompt' and 'messages'; got {fields}")
    refuse_unreadable(row, f"{where}: the row")
    last: Mapping[str, Any] = {}
    if "prompt" in row:
        messages = _user(text_of(row["prompt"], where, "'prompt'"))
    else:
        messages = checked_messages(row["messages"], where)
        check_order(messages, where)
        if messages and messages[-1]["role"] == "assistant":
            *earlier, last = messages
            messages = tuple(earlier)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{where}: the messages do not end with a user turn or a tool's result; put the "
            "question last, with at most one assistant turn after it as the response"
        )
    if not all(turn["content"].strip() for turn in messages if turn["role"] == "user"):
        raise InputError(f"{where}: the prompt is empty; give it text or remove the line")
    messages = (*_system(row, messages, where), *messages)
    response, answer, rivals = _response(row, last, where, given.response)
    identifier, category = row.get("id"), row.get("category")
    if identifier is None:
        identifier = given.number
    if type(identifier) is not int:
        identifier = text_of(identifier, where, "'id'")
    if category is not None:
        category = text_of(category, where, "'category'")
    unread = (given.others | row.keys()) - {"prompt", "messages", "id", "category", *_READ}
    variables = _variables(row, where)
    return Prompt(
        str(identifier),
        messages,
        category,
        response,
        answer,
        variables,
        rivals,
        frozenset(unread),
        where,
    )


_READ = {*RESPONSE_FIELDS, *VARIABLES, *SYSTEM_FIELDS, TEMPLATE_SETTINGS}


def _system(
    row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[Mapping[str, Any], ...]:
    """The system message that a row gives beside what is asked."""
    given = [name for name in SYSTEM_FIELDS if row.get(name) not in (None, "")]
    if not given:
        return ()
    text = text_of(row[given[0]], where, repr(given[0]))
    if len(given) > 1 or any(turn["role"] == "system" for turn in messages):
        other = repr(given[1]) if len(given) > 1 else "the messages"
        raise InputError(f"{where}: got a system message in {given[0]!r} and in {other}; keep one")
    return ({"role": "system", "content": text},)


def _response(
    row: Mapping[str, Any], last: Mapping[str, Any], where: str, chosen: str | None
) -> tuple[str | None, Mapping[str, Any], tuple[str, ...]]:
    """The row's own answer, what that has besides text, and where several are, their places."""
    beside = said_beside(last)
    texts: dict[str, str] = {}
    for name in (*RESPONSE_FIELDS, *([chosen] if chosen else [])):
        if name != "messages" and row.get(name) is not None:
            value = row[name]
            if str(value).strip():
                texts[repr(name)] = text_of(value, where, repr(name))
    if last and last.get("weight") != 0:
        texts["the last message"] = last["content"]
    if chosen is not None:
        place = "the last message" if chosen == "messages" else repr(chosen)
        if place not in texts:
            raise InputError(f"{where}: there is no response in {place}, which was chosen")
        texts = {place: texts[place]}
    if len(set(texts.values())) > 1:
        return None, {}, tuple(texts)
    place, response = next(iter(texts.items()), ("", None))
    if "the last message" in texts:
        return response, beside, ()
    apart = [row[key] for key in REASONING if isinstance(row.get(key), str) and row[key].strip()]
    if response is None or not apart:
        return response, {}, ()
    return response, {REASONING[0]: text_of(apart[0], where, "the reasoning")}, ()


def _variables(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the row gives the chat template; JSON may stand in a text, as it does in data sets."""
    variables: dict[str, Any] = {}
    for name, kind in (*((n, list) for n in VARIABLES), (TEMPLATE_SETTINGS, dict)):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            fault = f"{name!r} is a text that is not valid JSON"
            value = parsed(value, where, fault, "write it as JSON, or leave it out")
        if value is None or value in ("", [], {}):
            continue
        items = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(item, dict) for item in items):
            wanted = "a list of objects" if kind is list else "an object"
            raise InputError(f"{where}: {name!r} must be {wanted}; got {type(value).__name__}")
        text_of(json.dumps(value, ensure_ascii=False, default=str), where, repr(name))
        variables |= {name: value} if kind is list else value
    return variables


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)
