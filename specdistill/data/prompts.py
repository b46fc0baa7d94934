"""Prompts as every command takes them, read and checked row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdistill import limits
from specdistill.data.rows import (
    MEDIA,
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

ROLES = ("system", "user", "assistant")
BESIDE_TEXT = (*REASONING, "tool_calls")  # what a turn may say besides its content

# What would change what is asked or answered, and is read under another name.
_ELSEWHERE = {
    "functions": "list them under 'tools'",
    "function_call": "write it as 'tool_calls'",
    "history": "write it as earlier turns in 'messages'",
    "instruction": "write it into the prompt",
    "input": "write it into the prompt",
    "context": "write it into the prompt",
    "continue_final_message": "answers begin where a turn does, so leave it out",
    "prefix": "answers begin where a turn does, so leave it out",
}


@dataclass(frozen=True)
class Prompt:
    """What the models are asked: chat messages ending with a user turn.

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

    def one_response(self) -> str | None:
        """The response; None where there is none. Raises `InputError` where there are several."""
        if self.rivals:
            raise InputError(
                f"prompt {self.id!r} has a response in {' and in '.join(self.rivals)}; keep one, "
                "or choose by --response-column where the command has it"
            )
        return self.response

    @property
    def beside_text(self) -> list[str]:
        """Names of what it holds that no plain text can say."""
        said = {key for turn in self.messages for key in turn if key in BESIDE_TEXT}
        return [*self.variables, *sorted(said)]


def load_prompts(
    source: str,
    *,
    split: str | None = None,
    column: str | None = None,
    response_column: str | None = None,
    limit: int | None = None,
) -> list[Prompt]:
    """Read the prompts of `source`, or the first `limit` of them.

    `source` is `demo:train` or `demo:heldout`; a `.jsonl` file with {"prompt": ...} or
    {"messages": [...]} a line; a `.txt` file with a prompt a line; or a `datasets` id or folder,
    which needs `split` and `column` (of text or of messages). A line may have "id", "category",
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
    for row in itertools.islice(rows, limit):
        prompt, where = _prompt(row), row.where
        if prompt.id in first_use:
            raise InputError(
                f"{where}: id {prompt.id!r} was already used in {first_use[prompt.id]}; ids must "
                "be unique, and a line without an id takes its line number"
            )
        first_use[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{source} holds no prompts; it needs at least one")
    return prompts


def as_prompt(asked: str | Sequence[Mapping[str, Any]], number: int = 1) -> Prompt:
    """A text, which becomes one user message, or chat messages that end with a user turn. Raises
    `InputError` for what is neither.
    """
    field_ = "prompt" if isinstance(asked, str) else "messages"
    asked = list(asked) if isinstance(asked, tuple) else asked
    return _prompt(Row(f"prompt {number}", number, {field_: asked}))


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
    _refuse_unreadable(row, f"{where}: the row")
    last: Mapping[str, Any] = {}
    if "prompt" in row:
        messages = _user(_text(row["prompt"], where, "'prompt'"))
    else:
        messages = _messages(row["messages"], where)
        if messages and messages[-1]["role"] == "assistant":
            *earlier, last = messages
            messages = tuple(earlier)
    if not messages or messages[-1]["role"] != "user":
        raise InputError(
            f"{where}: the messages do not end with a user turn; put the question last, with at "
            "most one assistant turn after it as the response"
        )
    if not all(turn["content"].strip() for turn in messages if turn["role"] == "user"):
        raise InputError(f"{where}: the prompt is empty; give it text or remove the line")
    messages = (*_system(row, messages, where), *messages)
    response, answer, rivals = _response(row, last, where, given.response)
    identifier, category = row.get("id"), row.get("category")
    if identifier is None:
        identifier = given.number
    if type(identifier) is not int:
        identifier = _text(identifier, where, "'id'")
    if category is not None:
        category = _text(category, where, "'category'")
    unread = (given.others | row.keys()) - {"prompt", "messages", "id", "category", *_READ}
    variables = _variables(row, where)
    return Prompt(
        str(identifier), messages, category, response, answer, variables, rivals, frozenset(unread)
    )


_READ = {*RESPONSE_FIELDS, *VARIABLES, *SYSTEM_FIELDS, TEMPLATE_SETTINGS}


def _refuse_unreadable(holder: Mapping[str, Any], where: str) -> None:
    """Raises `InputError` for what would be lost though it belongs to what is asked."""
    for key in MEDIA:
        if holder.get(key):
            raise InputError(f"{where} has {key!r}, and only text can be asked; remove the line")
    for key, advice in _ELSEWHERE.items():
        if holder.get(key):
            raise InputError(f"{where} has {key!r}, which is not read; {advice}")


def _system(
    row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[Mapping[str, Any], ...]:
    """The system message that a row gives beside what is asked."""
    given = [name for name in SYSTEM_FIELDS if row.get(name) not in (None, "")]
    if not given:
        return ()
    text = _text(row[given[0]], where, repr(given[0]))
    if len(given) > 1 or any(turn["role"] == "system" for turn in messages):
        other = repr(given[1]) if len(given) > 1 else "the messages"
        raise InputError(f"{where}: got a system message in {given[0]!r} and in {other}; keep one")
    return ({"role": "system", "content": text},)


def _response(
    row: Mapping[str, Any], last: Mapping[str, Any], where: str, chosen: str | None
) -> tuple[str | None, Mapping[str, Any], tuple[str, ...]]:
    """The row's own answer, what that has besides text, and where several are, their places."""
    beside = {key: last[key] for key in BESIDE_TEXT if key in last}
    texts: dict[str, str] = {}
    for name in (*RESPONSE_FIELDS, *([chosen] if chosen else [])):
        if name != "messages" and row.get(name) is not None:
            value = row[name]
            if str(value).strip():
                texts[repr(name)] = _text(value, where, repr(name))
    if last and (last["content"].strip() or beside):
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
    return response, {REASONING[0]: _text(apart[0], where, "the reasoning")}, ()


def _variables(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the row gives the chat template; JSON may stand in a text, as it does in data sets."""
    found: dict[str, Any] = {}
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
        _text(json.dumps(value, ensure_ascii=False, default=str), where, repr(name))
        found |= {name: value} if kind is list else value
    return found


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Check chat messages. All that a turn says stays with it, for the chat template to see."""
    if not isinstance(value, list):
        raise InputError(f"{where}: 'messages' must be a list; got {type(value).__name__}")
    turns: list[Mapping[str, Any]] = []
    for number, message in enumerate(value, 1):
        beside = isinstance(message, dict) and any(message.get(key) for key in BESIDE_TEXT)
        wanted = {"role"} if beside else {"role", "content"}
        if not isinstance(message, dict) or not wanted <= message.keys():
            raise InputError(
                f"{where}: message {number} must be an object with 'role' and 'content'"
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: message {number} has role {message['role']!r}; it must be one of "
                f"{', '.join(ROLES)}"
            )
        _refuse_unreadable(message, f"{where}: message {number}")
        content = message.get("content")
        content = "" if content is None and beside else _content(content, where, number)
        others = {k: v for k, v in message.items() if v not in (None, "", [], {})}
        turn = {**others, "role": message["role"], "content": content}
        for key in REASONING:
            if key in turn:
                _text(turn[key], where, f"{key!r} of message {number}")
        if "tool_calls" in turn:
            turn["tool_calls"] = _calls(turn["tool_calls"], where, number)
        said = json.dumps(turn, ensure_ascii=False, default=str)  # as of dates in a data set
        turns.append(json.loads(_text(said, where, f"message {number}")))
    return tuple(turns)


def _content(value: object, where: str, number: int) -> str:
    """The text of a message, which may stand in a list of a single part."""
    what = f"the content of message {number}"
    if isinstance(value, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in value]
        if kinds != ["text"]:
            raise InputError(
                f"{where}: {what} is a list of the parts {', '.join(map(repr, kinds)) or 'none'}; "
                "only text can be asked, in one piece, since templates join parts differently"
            )
        value = value[0].get("text")
    return _text(value, where, what)


def _calls(value: object, where: str, number: int) -> list[dict[str, Any]]:
    """Tool calls, with arguments as objects: templates write a text of JSON as a quoted text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise InputError(f"{where}: 'tool_calls' of message {number} must be a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a tool call of message {number} names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            fault = f"'arguments' in message {number} is a text that is not valid JSON"
            arguments = parsed(arguments or "{}", where, fault, "write an object")
        whole = {**function, "arguments": arguments}
        calls.append({**call, "function": whole} if "function" in call else whole)
    return calls


def _text(value: object, where: str, what: str) -> str:
    """Return `value` if it is text a tokenizer can take."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} must be text; got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair, as in "\ud83d"
        raise InputError(
            f"{where}: {what} holds half of a surrogate pair at character {error.start + 1}; "
            "write the whole character"
        ) from error
    return value
