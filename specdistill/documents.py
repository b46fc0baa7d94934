"""YAML and JSON files read by a schema. Whatever such a file holds, what comes back is of the type
that was asked for, or an error of ours that names the file, the place in it and what stands there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from specdistill.errors import InputError, StorageError
from specdistill.limits import shown

T = TypeVar("T")
LONGEST_YAML = 2**20  # bytes
MOST_VALUES = 100_000  # of a YAML file, each alias counted as what it stands for


def read_json(file: Path, kind: type[T], advice: str) -> T:
    """The object that a JSON file of ours holds. Raises `StorageError`, which ends in the advice;
    a file that cannot be read is one, too.
    """
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        raise damaged(str(file), error, advice) from None
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}; {advice}") from error


def read_json_lines(
    file: Path, kind: type[T], advice: str, *, appended: bool = False
) -> Iterator[T]:
    """The objects of a JSON Lines file of ours, as `read_json`. Where lines are `appended`, a last
    one without a line break was cut off when its writer was killed, and is left out.
    """
    adapter = TypeAdapter(kind)
    try:
        *lines, last = file.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}; {advice}") from error
    if last and not appended:
        lines.append(last)
    for number, line in enumerate(lines, 1):
        try:
            yield adapter.validate_json(line, strict=True)
        except ValidationError as error:
            raise damaged(f"{file}, line {number}", error, advice) from None


def damaged(where: str, error: ValidationError, advice: str) -> StorageError:
    """The first thing that does not fit; the others mostly follow from it."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    got = "" if problem["type"] == "missing" else f" (got {shown(problem['input'], 60)})"
    return StorageError(
        f"{where} is damaged ({f'{place}: ' if place else ''}{problem['msg']}{got}); {advice}"
    )


class _Loader(yaml.SafeLoader):
    """YAML without dates and base 60, which turn a folder's name into something else."""

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        if _size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values, its aliases counted")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > 4096:
            raise yaml.YAMLError(
                f"a number of {value.bit_length():,} bits is beyond all that is used"
            )
        return int(value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises for a key that stands there twice; one that a merge brings along may be there."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {shown(key.value)} is there twice, line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z"),
    list("-+0123456789"),
)


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node stands for; without end where it is part of itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.SequenceNode) else sum(node.value, ())
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def parse_yaml(text: str | bytes, where: str) -> Any:
    """What a text in YAML says. Raises `InputError` for one that is none, that holds a key twice or
    a number of thousands of digits, is nested without end, or grows beyond all bounds by aliases.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; write it flat") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that a YAML file holds, with `section.key=value` overrides. Raises
    `InputError`.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read {path}: it is no file; name a YAML file")
        if path.stat().st_size > LONGEST_YAML:
            raise InputError(f"{path} has more than {LONGEST_YAML:,} bytes; it is no configuration")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping of keys to values; got {type(raw).__name__}")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise InputError(
                "an override is written key=value, for instance training.max_steps=500; got "
                f"{shown(override)}"
            )
        assign(raw, key, parse_yaml(value, f"the value of {shown(override)}"))
    return raw


def assign(raw: dict[str, Any], key: str, value: Any, *, once: bool = False) -> None:
    """Set `section.key` in nested mappings, `once` where nothing may stand there yet."""
    *sections, last = parts = key.split(".")
    if not all(parts) or len(parts) > 4:
        raise InputError(f"a key is written key or section.key; got {shown(key)}")
    place: Any = raw
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise InputError(f"{key!r}: {section!r} is a value, not a section")
    if once and last in place:
        raise InputError(f"{key!r} is given twice; leave one of them out")
    place[last] = value
