"""Prompts as every command takes them: the shipped workload, a file, or a `datasets` id."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdistill.data.workload import Split, workload
from specdistill.errors import InputError

ROLES = ("system", "user", "assistant")
RESPONSE_FIELDS = ("response", "completion", "answer")

_SOURCES = "a .jsonl or .txt file, demo:train, demo:heldout, a datasets id or a data set folder"
# A missing "prompts.csv" must not be looked for on the hub, where dots in names are legal.
_OTHER_SUFFIXES = (".arrow", ".csv", ".gz", ".json", ".md", ".parquet", ".tsv", ".yaml", ".zip")
_TEXT_DTYPES = ("string", "large_string")
_DATASETS_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Prompt:
    """What the models are asked: chat messages ending with a user turn.

    `messages` hold "role" and "content"; a bare prompt is one user message. `response` is the data
    set's own answer where it gives one.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    category: str | None = None
    response: str | None = None


def load_prompts(
    source: str, *, split: str | None = None, column: str | None = None, limit: int | None = None
) -> list[Prompt]:
    """Read the prompts of `source`, or the first `limit` of them.

    `source` is `demo:train` or `demo:heldout`; a `.jsonl` file with {"prompt": ...} or
    {"messages": [...]} a line, and "id", "category" and one of `RESPONSE_FIELDS` where wanted; a
    `.txt` file with a prompt a line; or a `datasets` id or folder, which needs `split` and
    `column` (of text or of messages). A last assistant message becomes the response. Ids are line
    numbers from 1 where the source gives none, and always row numbers for `datasets`.

    Raises:
        InputError: an unusable source, option or line; the message names the line.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1, or left out to read all")
    prompts: list[Prompt] = []
    first_use: dict[str, str] = {}
    for where, prompt in itertools.islice(_open(source, split, column), limit):
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


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Hash of what is asked, in its order."""
    asked = json.dumps([[p.id, list(p.messages)] for p in prompts])
    return hashlib.sha256(asked.encode()).hexdigest()


def _open(source: str, split: str | None, column: str | None) -> Iterator[tuple[str, Prompt]]:
    """Pick the reader for `source`; readers yield (where it stands, prompt)."""
    path = Path(source)
    suffix = path.suffix.lower()
    is_demo, is_file = source.startswith("demo:"), suffix in (".jsonl", ".txt")
    if is_demo or is_file:
        for option, value in (("split", split), ("column", column)):
            if value is not None:
                raise InputError(
                    f"{option} {value!r} has no effect on {source}; it is for datasets ids and "
                    "folders only, so leave it out"
                )
    if is_demo:
        return _read_demo(source)
    if is_file:
        return _read_jsonl(path) if suffix == ".jsonl" else _read_txt(path)
    if os.path.isfile(source) or (suffix in _OTHER_SUFFIXES and not os.path.isdir(source)):
        raise InputError(f"{source} is not a kind of prompt file; give {_SOURCES}")
    if not os.path.isdir(source) and not _DATASETS_ID.fullmatch(source):
        raise InputError(f"there is no file or folder {source!r}; give {_SOURCES}")
    return _read_dataset(source, split, column)


def _read_demo(source: str) -> Iterator[tuple[str, Prompt]]:
    splits: dict[str, Split] = {"demo:train": "train", "demo:heldout": "heldout"}
    if source not in splits:
        raise InputError(f"no demo prompts {source!r}; there are {' and '.join(splits)}")
    for number, row in enumerate(workload(splits[source]), 1):
        yield f"{source}, row {number}", Prompt(row["id"], _user(row["prompt"]), row["category"])


def _read_txt(path: Path) -> Iterator[tuple[str, Prompt]]:
    for number, where, line in _lines(path):
        yield where, Prompt(str(number), _user(line))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Prompt]]:
    for number, where, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error)  # as of a number of 5,000 digits
            if isinstance(error, json.JSONDecodeError):  # its own text says "line 1"
                reason = f"{error.msg} at column {error.colno}"
            raise InputError(
                f"{where}: not valid JSON, {reason}; each line must be one object such as "
                '{"prompt": "..."}'
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f'{where}: each line must be one object such as {{"prompt": "..."}}; '
                f"got {type(row).__name__}"
            )
        yield where, _prompt(row, where, number)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number from 1, where, text) of each line that is not blank."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a directory; give {_SOURCES}")
    try:
        with path.open("rb") as file:
            # Lines end at b"\n" alone: str.splitlines would also cut at U+2028 inside a string.
            for number, raw in enumerate(file, 1):
                where = f"{path}, line {number}"
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                try:
                    line = raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{where}: byte 0x{raw[error.start]:02x} at position {error.start + 1} is "
                        "not UTF-8; save the file as UTF-8"
                    ) from error
                if line.strip():
                    yield number, where, line
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give {_SOURCES}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_dataset(
    source: str, split: str | None, column: str | None
) -> Iterator[tuple[str, Prompt]]:
    import datasets  # heavy, and needed for this kind of source only

    try:
        if split is None:
            names = ", ".join(datasets.get_dataset_split_names(source))
            raise InputError(f"data set {source!r} needs a split; it has {names}")
        rows = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"cannot load {source!r} (split {split!r}) as a data set: {error}. Give {_SOURCES}"
        ) from error
    columns = ", ".join(rows.column_names)
    if column is None:
        raise InputError(f"data set {source!r} needs the column of its prompts; it has {columns}")
    if column not in rows.column_names:
        raise InputError(f"data set {source!r} has no column {column!r}; it has {columns}")
    # Other columns mean what the data set's author likes: a class label called "answer" is no
    # response, and ids that repeat are not the user's to mend, so rows are numbered.
    extras = [
        name
        for name in (*RESPONSE_FIELDS, "category")
        if name != column and getattr(rows.features.get(name), "dtype", None) in _TEXT_DTYPES
    ]
    for number, row in enumerate(rows.select_columns([column, *extras]), 1):
        where = f"{source}, split {split}, column {column}, row {number}"
        field = "messages" if isinstance(row[column], list) else "prompt"
        yield where, _prompt({field: row.pop(column), **row}, where, number)


def _prompt(row: Mapping[str, Any], where: str, number: int) -> Prompt:
    if ("prompt" in row) == ("messages" in row):
        fields = ", ".join(map(repr, row)) or "no fields"
        raise InputError(f"{where}: give one of 'prompt' and 'messages'; got {fields}")
    answers = {repr(field): row.get(field) for field in RESPONSE_FIELDS}
    if "prompt" in row:
        messages = _user(_text(row["prompt"], where, "'prompt'"))
    else:
        messages = _messages(row["messages"], where)
        if messages and messages[-1]["role"] == "assistant":
            answers["the last message"] = messages[-1]["content"]
            messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise InputError(
            f"{where}: the messages do not end with a user turn; put the question last, with at "
            "most one assistant turn after it as the response"
        )
    if not all(turn["content"].strip() for turn in messages if turn["role"] == "user"):
        raise InputError(f"{where}: the prompt is empty; give it text or remove the line")
    answers = {
        place: text for place, text in answers.items() if text is not None and str(text).strip()
    }
    if len(answers) > 1:
        raise InputError(f"{where}: got a response in {' and in '.join(answers)}; keep one")
    response = next((_text(text, where, place) for place, text in answers.items()), None)
    identifier, category = row.get("id"), row.get("category")
    if identifier is None:
        identifier = number
    if type(identifier) is not int:
        identifier = _text(identifier, where, "'id'")
    if category is not None:
        category = _text(category, where, "'category'")
    return Prompt(str(identifier), messages, category, response)


def _user(text: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": text},)


def _messages(value: object, where: str) -> tuple[Mapping[str, str], ...]:
    """Check chat messages. Only role and content of a turn are kept: no prompt here calls tools."""
    if not isinstance(value, list):
        raise InputError(f"{where}: 'messages' must be a list; got {type(value).__name__}")
    turns: list[Mapping[str, str]] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(
                f"{where}: message {number} must be an object with 'role' and 'content'"
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"{where}: message {number} has role {message['role']!r}; it must be one of "
                f"{', '.join(ROLES)}"
            )
        content = _text(message["content"], where, f"the content of message {number}")
        turns.append({"role": message["role"], "content": content})
    return tuple(turns)


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
