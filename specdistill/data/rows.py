"""The rows that prompts are made of: of the demo, of a file, or of a `datasets` id."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdistill.data.demo import Split, workload
from specdistill.errors import InputError

RESPONSE_FIELDS = ("response", "completion", "answer")
REASONING = ("reasoning_content", "reasoning", "thinking")
VARIABLES = ("tools", "documents")  # what a template may be given besides messages
TEMPLATE_SETTINGS = "chat_template_kwargs"
SYSTEM_FIELDS = ("system", "system_prompt")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
PARTS = ("instruction", "input", "context")  # columns that may hold a part of what is asked

_SOURCES = (
    "a .jsonl, .json, .parquet or .txt file, demo:train, demo:heldout, a datasets id or a data set "
    "folder"
)
# A missing "prompts.csv" must not be looked for on the hub, where dots in names are legal.
_OTHER_SUFFIXES = (".arrow", ".csv", ".gz", ".md", ".tsv", ".yaml", ".zip")
_TEXT_DTYPES = ("string", "large_string")
_DATASETS_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """Fields as a line of a .jsonl file has them. `where` it stands is for messages; `response` is
    the field that is chosen for the answer; `others` are fields that were not even read.
    """

    where: str
    number: int
    fields: Mapping[str, Any]
    response: str | None = None
    others: frozenset[str] = frozenset()


def open_rows(
    source: str, split: str | None, column: str | None, response_column: str | None
) -> Iterator[Row]:
    """The rows of a source, see `load_prompts`. Raises `InputError`."""
    path = Path(source)
    suffix = path.suffix.lower()
    is_demo, is_file = source.startswith("demo:"), suffix in _READERS
    if is_demo or is_file:
        for option, value in (("split", split), ("column", column)):
            if value is not None:
                raise InputError(
                    f"{option} {value!r} has no effect on {source}; it is for datasets ids and "
                    "folders only, so leave it out"
                )
    if response_column is not None and (is_demo or suffix == ".txt"):
        raise InputError(
            f"response_column {response_column!r} has no effect on {source}, which has no "
            "responses; leave it out"
        )
    if is_demo:
        return _read_demo(source)
    if is_file:
        if os.path.isdir(path):
            raise InputError(f"{path} is a directory; give {_SOURCES}")
        return _READERS[suffix](path, response_column)
    if os.path.isfile(source) or (suffix in _OTHER_SUFFIXES and not os.path.isdir(source)):
        raise InputError(f"{source} is not a kind of prompt file; give {_SOURCES}")
    if not os.path.isdir(source) and not _DATASETS_ID.fullmatch(source):
        raise InputError(f"there is no file or folder {source!r}; give {_SOURCES}")
    return _read_dataset(source, split, column, response_column)


def _read_demo(source: str) -> Iterator[Row]:
    splits: dict[str, Split] = {"demo:train": "train", "demo:heldout": "heldout"}
    if source not in splits:
        raise InputError(f"no demo prompts {source!r}; there are {' and '.join(splits)}")
    for number, row in enumerate(workload(splits[source]), 1):
        yield Row(f"{source}, row {number}", number, row)


def _read_txt(path: Path, response_column: str | None) -> Iterator[Row]:
    for number, where, line in _lines(path):
        yield Row(where, number, {"prompt": line})


def _read_jsonl(path: Path, response_column: str | None) -> Iterator[Row]:
    for number, where, line in _lines(path):
        advice = 'each line must be one object such as {"prompt": "..."}'
        row = parsed(line, where, "not valid JSON", advice)
        if not isinstance(row, dict):
            raise InputError(f"{where}: {advice}; got {type(row).__name__}")
        yield Row(where, number, row, response_column)


def _read_json(path: Path, response_column: str | None) -> Iterator[Row]:
    """A list of objects, as ShareGPT's files are."""
    lines: list[str] = []
    for number, _, line in _lines(path):
        lines += [""] * (number - 1 - len(lines)) + [line]  # so that an error tells the line
    advice = 'the file must be a list of objects such as {"prompt": "..."}'
    rows = parsed("\n".join(lines), str(path), "not valid JSON", advice) if lines else []
    if not isinstance(rows, list):
        raise InputError(f"{path}: {advice}; got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: {advice}; got {type(row).__name__}")
        yield Row(where, number, row, response_column)


def _read_parquet(path: Path, response_column: str | None) -> Iterator[Row]:
    """A row's columns are the fields of a line; Arrow gives every row the keys of all."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                fields = _without_nulls(row)
                yield Row(f"{path}, row {number}", number, fields, response_column)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give {_SOURCES}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path} as Parquet: {error}") from error


_READERS: Mapping[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a key that stands twice: one of them would be lost."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return unique


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line number from 1, where, text) of each line that is not blank."""
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
                if "\0" in line:
                    raise InputError(
                        f"{where}: a NUL at position {line.index(chr(0)) + 1}, which no text has; "
                        "save the file as UTF-8, not UTF-16"
                    )
                if line.strip():
                    yield number, where, line
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give {_SOURCES}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _read_dataset(
    source: str, split: str | None, column: str | None, response_column: str | None
) -> Iterator[Row]:
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
    for name in filter(None, (column, response_column)):
        if name not in rows.column_names:
            raise InputError(f"data set {source!r} has no column {name!r}; it has {columns}")
    if media := [name for name in rows.column_names if name in MEDIA]:
        raise InputError(f"data set {source!r} has a column {media[0]!r}; only text can be asked")
    # Other columns mean what the data set's author likes: a class label called "answer" is no
    # response, and ids that repeat are not the user's to mend, so rows are numbered.
    texts = (*RESPONSE_FIELDS, *REASONING, *SYSTEM_FIELDS, "category")
    extras = [
        name
        for name in rows.column_names
        if name != column
        and (
            name == response_column
            or name in (*VARIABLES, TEMPLATE_SETTINGS)
            or (name in texts and getattr(rows.features[name], "dtype", None) in _TEXT_DTYPES)
        )
    ]
    parts = [
        name
        for name in PARTS
        if name in rows.column_names
        and name not in (column, *extras)
        and getattr(rows.features[name], "dtype", None) in _TEXT_DTYPES
    ]
    others = frozenset(rows.column_names) - {column, *extras, *parts, "id", "prompt", "messages"}
    chosen = "messages" if response_column == column else response_column
    for number, row in enumerate(rows.select_columns([column, *extras, *parts]), 1):
        where = f"{source}, split {split}, column {column}, row {number}"
        asked = _without_nulls(row.pop(column))  # Arrow fills in what other rows have
        field_ = "messages" if isinstance(asked, list) else "prompt"
        beside = {name: row.pop(name) or "" for name in parts}
        if isinstance(asked, str):
            asked = _whole(asked, column, beside, where)
        given = {name: _without_nulls(value) for name, value in row.items()}
        yield Row(where, number, {field_: asked, **given}, chosen, others)


def _whole(asked: str, column: str, beside: Mapping[str, str], where: str) -> str:
    """What is asked, with what other columns hold of it: `input` under `instruction`, as Alpaca's
    format has it. Raises `InputError` for any other that would be ignored.
    """
    for name, text in beside.items():
        if not text.strip() or text.strip() in asked:
            continue
        if (column, name) != ("instruction", "input"):
            raise InputError(
                f"{where}: the column {name!r} may hold a part of the prompt and is not read; "
                "write both into one column, or as 'prompt' into a .jsonl file"
            )
        asked = f"{asked}\n{text}"
    return asked


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def parsed(text: str, where: str, fault: str, advice: str) -> Any:
    """The value of a JSON text. Raises `InputError`."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = str(error)  # as of a number of 5,000 digits
        if isinstance(error, json.JSONDecodeError):  # its own text says "line 1"
            line = f" of line {error.lineno}" if "\n" in text else ""
            reason = f"{error.msg} at column {error.colno}{line}"
        raise InputError(f"{where}: {fault}, {reason}; {advice}") from error
