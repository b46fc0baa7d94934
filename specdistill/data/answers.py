"""Answers that are text and nothing more: a folder of one file, a line an answer, which any prompt
reader reads too, beside a manifest of where they came from. A line counts once it is whole, so an
interruption loses no answer that was written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdistill.data.prompts import Prompt
from specdistill.data.store import MANIFEST, must_be_ours
from specdistill.errors import InputError, StorageError
from specdistill.files import write_whole

ANSWERS = "answers.jsonl"
SCHEMA = "specdistill.answers/1"
_MAY_DIFFER = ("server", "versions")  # where it ran, not what was asked


@dataclass(frozen=True)
class Answer:
    """A prompt as it was asked, the answer its response. Not `ended`: a limit cut it. `reasoning`
    is what a server gave apart from the text.
    """

    prompt: Prompt
    ended: bool
    reasoning: str | None = None


class AnswerStore:
    """A folder of text answers, open for appending."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Continue what `folder` holds, or begin. `facts` say what was asked of whom. Raises
        `StorageError` where it holds something else.
        """
        self.folder = folder
        facts = {"schema": SCHEMA, **facts}
        try:
            must_be_ours(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / MANIFEST).exists():
                self._check(facts)
            self._drop_half_a_line()
            write_whole(folder / MANIFEST, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write to {folder}: {error.strerror}; choose another folder"
            ) from error
        self.done = {answer.prompt.id for answer in _read(folder)}

    def append(self, answer: Answer) -> None:
        prompt = answer.prompt
        row = {
            "id": prompt.id,
            "category": prompt.category,
            "messages": list(prompt.messages),
            "response": prompt.response,
            "ended": answer.ended,
            "reasoning": answer.reasoning,
        }
        try:
            with (self.folder / ANSWERS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write to {self.folder / ANSWERS}: {error.strerror}; free space and run "
                "again to go on"
            ) from error
        self.done.add(prompt.id)

    def _check(self, facts: dict[str, Any]) -> None:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            differing = [n for n in facts if n not in _MAY_DIFFER and found.get(n) != facts[n]]
        except (ValueError, AttributeError) as error:
            raise StorageError(
                f"{self.folder / MANIFEST} is damaged ({error}); remove the folder and generate "
                "again"
            ) from error
        if differing:
            name = differing[0]
            raise StorageError(
                f"{self.folder} holds answers with another {name} ({found.get(name)}, now "
                f"{facts[name]}); choose another folder or remove it"
            )

    def _drop_half_a_line(self) -> None:
        """What a crash or a full disk left at the end."""
        file = self.folder / ANSWERS
        if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
            os.truncate(file, text.rfind(b"\n") + 1)  # at once, whenever the process is killed


def holds_answers(source: str) -> bool:
    """Whether `source` is a folder of text answers."""
    return (Path(source) / ANSWERS).exists()


def read_answers(folder: Path) -> list[Answer]:
    """All answers that say something. Raises `StorageError` by line where the file is damaged,
    `InputError` where there is none.
    """
    answers = [answer for answer in _read(folder) if (answer.prompt.response or "").strip()]
    if not answers:
        raise InputError(f"{folder} holds no answers yet; run `specdistill generate` to the end")
    return answers


def _read(folder: Path) -> Iterator[Answer]:
    file = folder / ANSWERS
    if not file.exists():
        return
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            prompt = Prompt(row["id"], tuple(row["messages"]), row["category"], row["response"])
            yield Answer(prompt, row["ended"], row["reasoning"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{file}, line {number} is damaged ({error}); remove the line and generate again"
            ) from error
