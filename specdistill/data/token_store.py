"""Target generations on disk: Parquet parts, and beside each a safetensors shard of the target's
signal (see `signal.py`), under one manifest with their checksums. A part counts once the manifest
lists it, so an interruption loses at most the part being written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import save_file

from specdistill.data.parts import Part, read_rows, read_signal, withdrawn, write_rows
from specdistill.data.signal import (
    NONE,
    Signal,
    TopK,
    joined,
    kept_tokens,
    positions_of,
)
from specdistill.documents import read_json
from specdistill.errors import InputError, StorageError
from specdistill.files import AGAIN, UNFINISHED, replacing, write_whole, writing
from specdistill.limits import shown
from specdistill.models import LanguageModel
from specdistill.models.hashes import file_sha256

SCHEMA = "specdistill.generations/2"
MANIFEST = "manifest.json"
CPU = torch.device("cpu")


@dataclass
class Example:
    """One answer, and what was kept of the target at its n response tokens. While it is not
    written: alpha_cost is the sum over them of what acceptance that loses which was not kept,
    log_prob that of their log-probabilities, where an outside engine said it. An answer within a
    conversation says which, as others begin with it.
    """

    id: str
    prompt_tokens: list[int]
    response_tokens: list[int]
    category: str | None = None
    signal: Signal | None = None
    alpha_cost: float = 0.0
    log_prob: float | None = None
    conversation: str | None = None


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


@dataclass
class Manifest:
    """What the parts have in common; a part of another target, tokenizer, set of prompts or setting
    is foreign.
    """

    target: str
    target_sha256: str
    tokenizer_sha256: str
    prompts_sha256: str
    settings: dict[str, Any]
    signal: str
    parts: list[Part] = field(default_factory=list)
    # [id, filter] of each prompt's answer that went, and then by filter how many more were no
    # choice among several answers to one.
    removed: list[Pair] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)
    # What the chat template was told: each different set of it once; none where nobody knows.
    chat_template_kwargs: list[dict[str, Any]] = field(default_factory=list)
    # Of who wrote in the target's place.
    writer_parameters: Annotated[int, Field(ge=0)] | None = None
    # Of an engine that answered in our engine's place: its version, how it ran, and how far what
    # it said of the target was from our own pass, see `Rereading`.
    engine: dict[str, Any] | None = None
    schema: str = SCHEMA
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def ids(self) -> set[str]:
        """Of the prompts answered so far."""
        return {id_ for part in self.parts for id_ in part["ids"] if id_ not in withdrawn(part)}


def tokenizer_sha256(model: LanguageModel) -> str:
    """Hash of the vocabulary and the chat template: what decides which tokens a prompt becomes."""
    vocab = sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps([vocab, model.tokenizer.chat_template]).encode()).hexdigest()


class Store:
    """A folder of generations, open for appending."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Continue what `folder` holds, or begin. Raises `StorageError` where it holds something
        else.
        """
        self.folder, self.manifest = folder, manifest
        if (folder / MANIFEST).exists() and (
            (before := read_manifest(folder)).parts or before.removed
        ):
            for name in (
                "target_sha256",
                "tokenizer_sha256",
                "prompts_sha256",
                "settings",
                "signal",
            ):
                ours, theirs = getattr(manifest, name), getattr(before, name)
                if ours != theirs:
                    raise of_others(folder, name, theirs, ours)
            self.manifest = before
            return
        must_be_ours(folder)
        with writing(f"to {folder}", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            self._write(manifest)

    def done(self) -> set[str]:
        """Ids of the prompts answered so far."""
        return self.manifest.ids

    def texts(self) -> list[list[int]]:
        """The answers so far."""
        if not self.manifest.parts:
            return []
        return [e.response_tokens for e in read_examples(self.folder, signal=False)]

    def tail(self) -> dict[str, float] | None:
        """Of a top-k signal, the mean over tokens of the tail's mass and of `alpha_cost`; those of
        withdrawn answers, equals of others, count too.
        """
        parts = self.manifest.parts
        if not parts or "tail_mass" not in parts[0]:
            return None
        tokens = max(sum(part["tokens"] for part in parts), 1)
        return {
            "tail_mass": sum(part.get("tail_mass", 0.0) for part in parts) / tokens,
            "alpha_cost": sum(part.get("alpha_cost", 0.0) for part in parts) / tokens,
        }

    def filtered(self) -> dict[str, Any]:
        """Of the answers that filters removed: their number by filter, the prompts that were then
        answered in another way, and those that were given up or are still open.
        """
        prompts, done = {id_ for id_, _ in self.manifest.removed}, self.done()
        removed = Counter(name for _, name in self.manifest.removed)
        return {
            "removed": dict(removed + Counter(self.manifest.passed_over)),
            "regenerated": len(prompts & done),
            "dropped": len(prompts - done),
        }

    def append(
        self,
        examples: list[Example],
        removed: Sequence[tuple[str, str]] = (),
        passed_over: Counter[str] | None = None,
    ) -> None:
        """Write one part and list it, with the (id, filter) of answers that went meanwhile, and the
        number of others by filter. Raises `StorageError` when the disk is full; listed parts stay
        intact.
        """
        manifest = replace(
            self.manifest,
            removed=[*self.manifest.removed, *([*pair] for pair in removed)],
            passed_over=dict(Counter(self.manifest.passed_over) + (passed_over or Counter())),
        )
        stem = self.folder / f"part-{len(self.manifest.parts):05d}"
        tokens = sum(len(e.response_tokens) for e in examples)
        part: Part = {"ids": [e.id for e in examples], "tokens": tokens, "parquet_sha256": ""}
        with writing(f"{stem.name} to {self.folder}", AGAIN):
            if not examples:
                self._write(manifest)
                return
            with replacing(stem.with_suffix(".parquet")) as new:
                write_rows(examples, new)
            part["parquet_sha256"] = file_sha256(stem.with_suffix(".parquet"))
            if self.manifest.signal != NONE:
                signal = joined([e.signal for e in examples if e.signal is not None], CPU)
                if isinstance(signal, TopK):
                    part["tail_mass"] = signal.log_tail.exp().sum().item()
                    part["alpha_cost"] = sum(e.alpha_cost for e in examples)
                with replacing(stem.with_suffix(".safetensors")) as new:
                    save_file(signal.tensors(), new)
                part["signal_sha256"] = file_sha256(stem.with_suffix(".safetensors"))
            self._write(replace(manifest, parts=[*self.manifest.parts, part]))

    def withdraw(self, ids: AbstractSet[str], reason: str) -> None:
        """Remove answers after they were written: their parts stay as they are, the manifest has
        readers leave them out. Raises `StorageError`.
        """
        if not ids:
            return
        parts: list[Part] = [
            {**part, "withdrawn": sorted(withdrawn(part) | ids & {*part["ids"]})}
            for part in self.manifest.parts
        ]
        removed = [*self.manifest.removed, *([id_, reason] for id_ in sorted(ids))]
        with writing(f"to {self.folder}", AGAIN):
            self._write(replace(self.manifest, parts=parts, removed=removed))

    def _write(self, manifest: Manifest) -> None:
        write_whole(self.folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        self.manifest = manifest


def must_be_ours(folder: Path) -> None:
    """Raises `StorageError` for a folder that holds something and no answers of `generate`."""
    ours = (MANIFEST, UNFINISHED)
    others = folder.is_dir() and any(not f.name.startswith(ours) for f in folder.iterdir())
    if others and not (folder / MANIFEST).exists():
        raise StorageError(
            f"{folder} exists and holds no answers of `generate`; name another folder or remove it"
        )


def of_others(folder: Path, name: str, theirs: Any, ours: Any) -> StorageError:
    """For a folder whose answers were made with another value of what its manifest calls `name`."""
    theirs, ours = _apart(theirs, ours)
    words = {
        "settings": "other settings",
        "prompts_sha256": "other prompts, by their hash",
        "target_sha256": "another target, by the hash of its weights and its config",
    }.get(name, f"another {name}")
    return StorageError(
        f"{folder} holds answers with {words} ({theirs}, now {ours}); choose another folder or "
        "remove it"
    )


def _apart(theirs: Any, ours: Any) -> tuple[Any, Any]:
    """Both without what is equal in them."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return theirs, ours
    keys = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
    pairs = {k: _apart(theirs.get(k), ours.get(k)) for k in keys}
    return {k: pair[0] for k, pair in pairs.items()}, {k: pair[1] for k, pair in pairs.items()}


def read_manifest(folder: Path) -> Manifest:
    """Raises `InputError` where there is none, or of another schema, `StorageError` where it is
    damaged.
    """
    file = folder / MANIFEST
    advice = "remove the folder and generate again"
    if not file.exists():
        raise InputError(
            f"{folder} holds no {MANIFEST}: not a folder made by `specdistill generate`"
        )
    schema = read_json(file, dict[str, Any], advice).get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{file} has schema {shown(schema)}, and here {SCHEMA!r} is wanted, the tokens and "
            "signal of a local target; name another folder, or make one anew"
        )
    manifest = read_json(file, Manifest, advice)
    kept_tokens(manifest.signal)
    if manifest.signal != NONE and not all("signal_sha256" in part for part in manifest.parts):
        raise StorageError(f"{file} is damaged (a part lacks its signal_sha256); {advice}")
    return manifest


def read_examples(folder: Path, *, signal: bool) -> list[Example]:
    """All answers, with the kept signal if asked for. Truncated, swapped or missing files raise
    `StorageError` by name.
    """
    manifest = read_manifest(folder)
    if signal and manifest.signal == NONE:
        raise InputError(f"{folder} keeps no signal; generate with it, or distil with signal: live")
    examples: list[Example] = []
    for number, part in enumerate(manifest.parts):
        examples += _read_part(folder / f"part-{number:05d}", part, signal)
    if not examples:
        if manifest.removed:
            raise InputError(
                f"{folder} holds no answers: filters removed all {len(manifest.removed)}; generate "
                "anew, in another folder, with filters that leave some"
            )
        raise InputError(f"{folder} holds no answers yet; run `specdistill generate` to the end")
    return examples


def _read_part(stem: Path, part: Part, signal: bool) -> Iterable[Example]:
    parquet_file, signal_file = stem.with_suffix(".parquet"), stem.with_suffix(".safetensors")
    hashes = {parquet_file: part["parquet_sha256"]}
    if signal:
        hashes[signal_file] = part["signal_sha256"]
    for file, recorded in hashes.items():
        if not file.exists() or file_sha256(file) != recorded:
            state = "is truncated, changed or from other data" if file.exists() else "is missing"
            raise StorageError(f"{file} {state}; remove the folder and generate again")
    rows = read_rows(parquet_file, part)
    signals = read_signal(signal_file, part["tokens"]) if signal else None
    start = 0
    gone = withdrawn(part)
    for row in rows:
        example = Example(**row)
        if signals is not None:
            stop = start + len(example.response_tokens)
            example.signal = positions_of(signals, slice(start, stop))
            start = stop
        if example.id not in gone:
            yield example
