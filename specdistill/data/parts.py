"""The two files of a part of token answers: a Parquet file of rows and a safetensors shard of the
target's signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import TypedDict

from specdistill.data.signal import Signal, from_tensors
from specdistill.errors import StorageError
from specdistill.limits import shown

CONVERSATION = "conversation"  # a column that not every part has


class Part(TypedDict, total=False):
    """What the manifest says of a part: the hash of each file, and where only some tokens are kept
    of the target, sums over the part's tokens of what is outside them and what that costs.
    """

    ids: Required[list[str]]
    tokens: Required[Annotated[int, Field(ge=0)]]
    parquet_sha256: Required[str]
    signal_sha256: str
    withdrawn: list[str]
    tail_mass: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    alpha_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)]


def withdrawn(part: Part) -> set[str]:
    """Ids of a part's answers that no longer count; the prompt may have another in a later part."""
    return set(part.get("withdrawn", ()))


def write_rows(rows: Sequence[Any], file: Path) -> None:
    """Write the fields of a row of each of `rows`. Raises `OSError`."""
    import pyarrow as pa
    from pyarrow import parquet

    text, tokens = pa.string(), pa.list_(pa.int64())
    kinds = {"id": text, "category": text, "prompt_tokens": tokens, "response_tokens": tokens}
    if any(row.conversation is not None for row in rows):
        kinds[CONVERSATION] = text
    columns = {name: [getattr(row, name) for row in rows] for name in kinds}
    with file.open("wb") as sink:
        parquet.write_table(pa.table(columns, pa.schema(kinds)), sink)


def read_rows(file: Path, part: Part) -> list[dict[str, Any]]:
    """The rows of a Parquet file. Its hash says that it is the one the manifest lists, and not that
    it holds what it should. Raises `StorageError`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "id": pa.types.is_string,
        "category": lambda kind: pa.types.is_string(kind) or pa.types.is_null(kind),
        "prompt_tokens": lambda kind: pa.types.is_list(kind) and pa.types.is_int64(kind.value_type),
        "response_tokens": lambda kind: (
            pa.types.is_list(kind) and pa.types.is_int64(kind.value_type)
        ),
    }
    try:
        table = parquet.read_table(file)
        if CONVERSATION in table.column_names:  # of turns alone
            columns[CONVERSATION] = columns["category"]
        kinds = {name: table.schema.field(name).type for name in columns}
        if wrong := [name for name, fits in columns.items() if not fits(kinds[name])]:
            raise ValueError(f"the column {wrong[0]} is of type {kinds[wrong[0]]}")
        rows = table.select(list(columns)).to_pylist()
        for row in rows:
            for name in ("prompt_tokens", "response_tokens"):
                if row[name] is None or None in row[name] or min(row[name], default=0) < 0:
                    raise ValueError(f"{name} of {shown(row['id'])} are no list of token ids")
            if not row["prompt_tokens"]:
                raise ValueError(f"{shown(row['id'])} has no prompt")
        if [row["id"] for row in rows] != part["ids"]:
            raise ValueError("its ids are not those that the manifest lists")
        if (tokens := sum(len(row["response_tokens"]) for row in rows)) != part["tokens"]:
            raise ValueError(f"it has {tokens} tokens, and the manifest lists {part['tokens']}")
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise StorageError(
            f"{file} is damaged ({error}); remove the folder and generate again"
        ) from error
    return rows


def read_signal(file: Path, tokens: int) -> Signal:
    """A shard, with a position for every token. Raises `StorageError`."""
    try:
        tensors = load_file(file)
        signal = from_tensors(tensors)
        widths = {name: tensor.dim() - 1 for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if len(tensor.shape) == 0 or len(tensor) != tokens:
                raise ValueError(f"{name} has the shape {[*tensor.shape]} for {tokens} tokens")
            if widths[name] != (name not in ("logsumexp", "log_tail")):
                raise ValueError(f"{name} has {widths[name] + 1} dimensions")
            if tensor.is_floating_point() != (name != "tokens"):
                raise ValueError(f"{name} holds {tensor.dtype}")
            if tensor.isnan().any():
                raise ValueError(f"{name} holds what are no numbers")
    except (OSError, ValueError, SafetensorError) as error:
        raise StorageError(
            f"{file} is damaged ({error}); remove the folder and generate again"
        ) from error
    return signal
