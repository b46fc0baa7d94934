"""Answers that are text and nothing more, of a server: a folder of two files beside a manifest of
where they came from. `replies.jsonl` has all that the server said, a line a reply, which counts
once it is whole, so that an interruption loses none that was paid for; `answers.jsonl` has those
that are kept, and any prompt reader reads it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from specdistill.data.filters import DUPLICATE, Judged, repeated, words
from specdistill.data.prompts import Prompt
from specdistill.data.rows import REASONING
from specdistill.data.scorers import Candidate
from specdistill.data.selection import Selection
from specdistill.data.token_store import MANIFEST, must_be_ours, of_others
from specdistill.documents import read_json, read_json_lines
from specdistill.errors import InputError
from specdistill.files import AGAIN, write_whole, writing

ANSWERS, REPLIES = "answers.jsonl", "replies.jsonl"
SCHEMA = "specdistill.answers/2"
EMPTY = "empty"  # why a reply goes that says nothing
_MAY_DIFFER = ("server", "versions")  # where it ran, not what was asked


@dataclass(frozen=True)
class TextAnswer:
    """A prompt as it was asked, the answer its response. Not `ended`: a limit cut it. `reasoning`
    is what a server gave apart from the text.
    """

    prompt: Prompt
    ended: bool
    reasoning: str | None = None


@dataclass(frozen=True)
class Reply:
    """What a server said when a prompt was asked for the `attempt`-th time, from 0. Where it was
    asked for, `log_probability` is the mean of its tokens'.
    """

    id: str
    attempt: Annotated[int, Field(ge=0)]
    text: str
    ended: bool
    reasoning: str | None = None
    log_probability: float | None = None
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


Replies = Mapping[str, Mapping[int, Reply]]  # by prompt and attempt


@dataclass(frozen=True)
class Settled:
    """What replies come to: the answers that are kept, in the order of the prompts, and the
    (prompt, attempt) to ask next. `removed` counts replies by what removed them.
    """

    answers: list[TextAnswer]
    missing: Sequence[tuple[Prompt, int]] = ()
    removed: Mapping[str, int] = field(default_factory=dict)
    regenerated: int = 0  # prompts that were then answered in another way
    dropped: int = 0  # those that were given up or are still open
    unvaried: int = 0  # prompts asked more than once, if all replies to each of them are the same

    @property
    def counts(self) -> dict[str, Any]:
        return {
            "removed": dict(self.removed),
            "regenerated": self.regenerated,
            "dropped": self.dropped,
        }


class Choices:
    """What a selection keeps of a round of replies to a prompt, worked out once: a scorer of the
    user's own may be slow. Where there is a choice, replies that say nothing have no part in it.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self._known: dict[tuple[str, tuple[int, ...]], tuple[Reply | None, list[str]]] = {}

    def among(self, prompt: Prompt, replies: Sequence[Reply]) -> tuple[Reply | None, list[str]]:
        """The reply that is kept, if one is, and why others are not."""
        key = prompt.id, tuple(reply.attempt for reply in replies)
        if key not in self._known:
            self._known[key] = self._choose(prompt, replies)
        return self._known[key]

    def _choose(self, prompt: Prompt, replies: Sequence[Reply]) -> tuple[Reply | None, list[str]]:
        selection = self.selection
        if not selection.filters.remove and selection.best_of is None:
            return replies[0], []
        answers = [reply for reply in replies if reply.text.strip()]

        def candidate(place: int) -> Candidate:
            value = answers[place].log_probability
            return Candidate(answers[place].text, nan if value is None else value)

        seen = [Judged(words(reply.text), reply.ended) for reply in answers]
        place, gone = selection.choose(prompt, seen, candidate)
        chosen = None if place is None else answers[place]
        return chosen, [*gone, *[EMPTY] * (len(replies) - len(answers))]


def settle(
    prompts: Sequence[Prompt],
    replies: Replies,
    choices: Choices,
    retries: Callable[[Prompt], int],
    refused: Container[tuple[str, int]] = (),
) -> Settled:
    """A prompt is asked `selection.number` times, a round; where none of its replies stays there is
    another round, up to `retries`. `refused` attempts are done without, if others of their round
    were answered. Says nothing but what follows from the replies, so an interrupt changes nothing.
    """
    selection = choices.selection
    duplicates = selection.filters.duplicates
    chosen: dict[str, Reply] = {}
    missing: list[tuple[Prompt, int]] = []
    removed: Counter[str] = Counter()
    failed: Counter[str] = Counter()  # rounds, by prompt

    def remove_duplicate(id_: str) -> None:
        del chosen[id_]
        removed[DUPLICATE] += 1
        failed[id_] += 1

    def absent(prompt: Prompt, round_: int) -> list[tuple[Prompt, int]]:
        by_attempt = replies.get(prompt.id, {})
        left = [a for a in selection.attempts(round_) if a not in by_attempt]
        return [(prompt, a) for a in left if (prompt.id, a) not in refused]

    for prompt in prompts:
        by_attempt = replies.get(prompt.id, {})
        for round_ in range(retries(prompt) + 1):
            attempts = selection.attempts(round_)
            if prompt.id in chosen:
                if not duplicates or max(by_attempt) < attempts[0]:
                    break
                remove_duplicate(prompt.id)  # else it would not have been asked again
            following = absent(prompt, round_)
            missing += following
            asked = [by_attempt[attempt] for attempt in attempts if attempt in by_attempt]
            if following or not asked:
                break
            reply, gone = choices.among(prompt, asked)
            removed.update(gone)
            if reply is None:
                failed[prompt.id] += 1
            else:
                chosen[prompt.id] = reply
    if duplicates:
        order = sorted(chosen, key=lambda id_: (failed[id_], id_))
        by_id = {prompt.id: prompt for prompt in prompts}
        for id_ in repeated((id_, chosen[id_].text) for id_ in order):
            remove_duplicate(id_)
            if failed[id_] <= retries(by_id[id_]):
                missing += absent(by_id[id_], failed[id_])
    return Settled(
        [_answer(prompt, chosen[prompt.id]) for prompt in prompts if prompt.id in chosen],
        missing,
        removed,
        regenerated=len(failed.keys() & chosen.keys()),
        dropped=len(failed.keys() - chosen.keys()),
        unvaried=_unvaried(replies),
    )


def _unvaried(replies: Replies) -> int:
    again = [
        {reply.text for reply in by_attempt.values()}
        for by_attempt in replies.values()
        if len(by_attempt) > 1
    ]
    return len(again) if all(len(texts) == 1 for texts in again) else 0


def _answer(prompt: Prompt, reply: Reply) -> TextAnswer:
    return TextAnswer(replace(prompt, response=reply.text), reply.ended, reply.reasoning)


class AnswerStore:
    """A folder of text answers, open for appending."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Continue what `folder` holds, or begin. `facts` say what was asked of whom. Raises
        `StorageError` where it holds something else.
        """
        self.folder = folder
        self.facts = {"schema": SCHEMA, **facts}
        with writing(f"to {folder}", "choose another folder"):
            must_be_ours(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._drop_half_a_line()
            self.replies: dict[str, dict[int, Reply]] = {}
            self.count = 0  # of replies, to all prompts
            if (folder / REPLIES).exists():
                advice = "remove the line and ask again"
                for reply in read_json_lines(folder / REPLIES, Reply, advice):
                    self._add(reply)
            if (folder / MANIFEST).exists():
                self._check()
            self._write_manifest({})

    def append(self, reply: Reply) -> None:
        file = self.folder / REPLIES
        with writing(f"to {file}", AGAIN), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(reply)) + "\n")
        self._add(reply)

    def keep(self, settled: Settled) -> None:
        """Write what is kept of the replies, and the counts."""
        rows = [
            {
                "id": answer.prompt.id,
                "category": answer.prompt.category,
                "messages": list(answer.prompt.messages),
                "response": answer.prompt.response,
                "ended": answer.ended,
                "reasoning": answer.reasoning,
            }
            for answer in settled.answers
        ]
        file = self.folder / ANSWERS
        with writing(f"to {file}", AGAIN):
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
            self._write_manifest(settled.counts)

    def _add(self, reply: Reply) -> None:
        self.replies.setdefault(reply.id, {})[reply.attempt] = reply
        self.count += 1

    def _write_manifest(self, counts: dict[str, Any]) -> None:
        text = json.dumps({**self.facts, **counts}, indent=1) + "\n"
        write_whole(self.folder / MANIFEST, text)

    def _check(self) -> None:
        """A folder without a reply may begin anew, but not one of another kind."""
        facts = self.facts
        before = read_json(
            self.folder / MANIFEST, dict[str, Any], "remove the folder and ask again"
        )
        differing = [n for n in facts if n not in _MAY_DIFFER and before.get(n) != facts[n]]
        if differing and (self.replies or "schema" in differing):
            name = differing[0]
            raise of_others(self.folder, name, before.get(name), facts[name])

    def _drop_half_a_line(self) -> None:
        """What a crash or a full disk left at the end."""
        file = self.folder / REPLIES
        if file.exists() and not (text := file.read_bytes()).endswith(b"\n"):
            os.truncate(file, text.rfind(b"\n") + 1)  # at once, whenever the process is killed


class _Turn(TypedDict):
    role: str
    content: str


class _Row(BaseModel):
    """A line of answers.jsonl."""

    model_config = ConfigDict(extra="forbid")
    id: str
    category: str | None
    messages: Annotated[list[_Turn], Field(min_length=1)]
    response: str
    ended: bool
    reasoning: str | None

    def answer(self) -> TextAnswer:
        beside = {REASONING[0]: self.reasoning} if self.reasoning else {}
        prompt = Prompt(self.id, tuple(self.messages), self.category, self.response, beside)
        return TextAnswer(prompt, self.ended, self.reasoning)


def holds_text(source: str) -> bool:
    """Whether `source` is a folder of text answers."""
    return any((Path(source) / name).exists() for name in (ANSWERS, REPLIES))


def read_answers(folder: Path) -> list[TextAnswer]:
    """All answers that say something. Raises `StorageError` by line where the file is damaged,
    `InputError` where there is none.
    """
    file, advice = folder / ANSWERS, "remove the line and ask again"
    rows = read_json_lines(file, _Row, advice) if file.exists() else []
    answers = [row.answer() for row in rows if row.response.strip()]
    if not answers and file.exists():
        raise InputError(
            f"{folder} holds no answers: all that the server said is in {REPLIES}, and none of it "
            "was kept; ask again, in another folder, with filters that leave some"
        )
    if not answers:
        raise InputError(f"{folder} holds no answers yet; run `specdistill ask` to the end")
    return answers
