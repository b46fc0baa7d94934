"""More prompts, written by the target itself from examples of those there are (Self-Instruct,
2212.10560), without near duplicates.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from rapidfuzz.distance import Indel

from specdistill import limits
from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.decoding import Request, Sampling, SpeculativeDecoder
from specdistill.documents import read_json, read_json_lines
from specdistill.errors import InputError, StorageError
from specdistill.files import AGAIN, held, lock_of, write_whole, writing
from specdistill.limits import shown
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent

SCHEMA = "specdistill.widening/1"
WRITTEN = "written-"  # before the number of the draft, in a prompt's id
SHORTEST, LONGEST = 3, 150  # words of an instruction, as in the paper
TRIES = 10  # drafts of an instruction, at most, for each that is wanted
ASK = "Above are requests that people made. Write one more, of the same kind but about something \
else. Write the request alone."


@dataclass(frozen=True)
class Widening:
    """`count` new instructions, each asked for with `shots` of the known ones, none of them more
    like another than `max_similarity` (ROUGE-L, the F1 of the longest common subsequence of words).
    """

    count: int
    shots: int = 6
    max_similarity: float = 0.7
    max_new_tokens: int = 96
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {
            "count": limits.COUNT,
            "shots": limits.SHOTS,
            "max_new_tokens": limits.NEW_TOKENS,
            "temperature": limits.TEMPERATURE,
            "seed": limits.SEED,
        }.items():
            limits.check(name, getattr(self, name), allowed)
        if not 0 < self.max_similarity <= 1:
            raise InputError(
                f"max_similarity must be above 0 and at most 1; got {self.max_similarity}"
            )


@dataclass
class Widened:
    """What was written, and how many drafts fell away by reason."""

    prompts: list[Prompt]
    removed: Counter[str]


def widen(
    target: LanguageModel | Callable[[], LanguageModel],
    prompts: Sequence[Prompt],
    file: Path,
    plan: Widening,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Widened:
    """Have the target write instructions until `file` (.jsonl) holds `plan.count` of them, or
    `TRIES` times as many were drafted. They are drafted `batch_size` at a time, and examples are
    drawn from the prompts and what was written before. The same call again goes on where an
    interrupted one stopped, and ends with the same file. A target that is given as a function is
    loaded once nobody else is at work on the file.

    Raises `InputError` where there are fewer prompts than shots or they leave the target no room
    to write, `StorageError` where the file holds something else or cannot be written.
    """
    if len(prompts) < plan.shots:
        raise InputError(
            f"{plan.shots} examples are to be shown, and there are {len(prompts)} prompts; show "
            f"fewer (--shots {max(len(prompts), 1)})"
        )
    with held(lock_of(file)):
        target = target if isinstance(target, LanguageModel) else target()
        return _write(target, prompts, file, plan, batch_size, progress)


def _write(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    file: Path,
    plan: Widening,
    batch_size: int,
    progress: Progress,
) -> Widened:
    store = _Progress(
        file,
        {
            "schema": SCHEMA,
            "target_sha256": target.sha256(),
            "prompts_sha256": prompts_sha256(prompts),
            "settings": asdict(plan) | {"batch_size": batch_size},
        },
    )
    widened, start = store.read()
    known = [_instruction(prompt) for prompt in [*prompts, *widened.prompts]]
    decoder = SpeculativeDecoder(target, batch_size=batch_size)
    for first in range(start, TRIES * plan.count, batch_size):
        if len(widened.prompts) >= plan.count:
            break
        numbers = range(first, min(first + batch_size, TRIES * plan.count))
        for number, (text, whole) in zip(
            numbers, _drafted(decoder, target, known, numbers, plan), strict=True
        ):
            reason = _fault(text, whole, known, plan.max_similarity)
            if reason is None and len(widened.prompts) < plan.count:
                known.append(text)
                widened.prompts.append(Prompt(f"{WRITTEN}{number}", (_user(text),)))
            elif reason is not None:
                widened.removed[reason] += 1
        store.write(widened, numbers.stop)
        progress("widen", len(widened.prompts), plan.count, f"{widened.removed.total()} removed")
    return widened


class _State(BaseModel):
    """FILE.json, beside the facts of what was asked."""

    model_config = ConfigDict(extra="allow")
    next: int = Field(ge=0)
    removed: dict[str, Annotated[int, Field(ge=0)]]


class _Written(BaseModel):
    """A line of the file of prompts."""

    id: str = Field(pattern=f"^{WRITTEN}[0-9]{{1,18}}$")
    prompt: str

    @property
    def number(self) -> int:
        """Of the draft that it was."""
        return int(self.id.removeprefix(WRITTEN))


class _Progress:
    """The file of prompts, and beside it FILE.json with what was asked and how far it came. That
    one is there first, so that what is begun is known as such, and afterwards follows the prompts:
    those beyond the point reached are forgotten.
    """

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self.file, self.state, self.facts = file, file.with_name(f"{file.name}.json"), facts

    def read(self) -> tuple[Widened, int]:
        """What there is, and the number of the next draft."""
        if not self.state.exists():
            if self.file.exists():
                raise StorageError(f"{self.file} exists and is not of `widen`; name another file")
            self.write(Widened([], Counter()), 0)
        advice = f"remove {self.state} and {self.file} and begin again"
        state = read_json(self.state, _State, advice)
        rows = list(read_json_lines(self.file, _Written, advice)) if self.file.exists() else []
        prompts = [Prompt(row.id, (_user(row.prompt),)) for row in rows if row.number < state.next]
        begun = state.model_dump()
        for name, now in self.facts.items():
            if begun.get(name) != now:
                raise StorageError(
                    f"{self.file} was written with another {name} ({shown(begun.get(name))}, now "
                    f"{now}); name another file"
                )
        return Widened(prompts, Counter(state.removed)), state.next

    def write(self, widened: Widened, following: int) -> None:
        rows = [{"id": p.id, "prompt": _instruction(p)} for p in widened.prompts]
        state = self.facts | {"next": following, "removed": dict(widened.removed)}
        with writing(self.file, AGAIN):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if following:
                write_whole(self.file, "".join(json.dumps(row) + "\n" for row in rows))
            write_whole(self.state, json.dumps(state, indent=1) + "\n")


def _drafted(
    decoder: SpeculativeDecoder,
    target: LanguageModel,
    known: Sequence[str],
    numbers: Iterable[int],
    plan: Widening,
) -> list[tuple[str, bool]]:
    """A text for each number, and whether it came to its own end. Raises `InputError` where the
    examples leave it no room.
    """
    requests = []
    for number in numbers:
        examples = random.Random(f"{plan.seed}:{number}").sample(list(known), plan.shots)
        listed = "\n\n".join(f"Request: {text}" for text in examples)
        asked = Prompt(str(number), (_user(f"{listed}\n\n{ASK}"),))
        tokens = encode_prompt(target.tokenizer, asked)
        if len(tokens) + plan.max_new_tokens > target.max_length:
            raise InputError(
                f"{plan.shots} examples come to {len(tokens)} tokens, up to {plan.max_new_tokens} "
                f"are to be written after them, and {target.name} reads {target.max_length} "
                "positions; show fewer (--shots), or remove long ones such as "
                f"{shown(max(examples, key=len))}"
            )
        sampling = Sampling(plan.temperature)
        requests.append(Request(asked.id, tokens, plan.max_new_tokens, sampling, plan.seed))
    outputs = decoder.run(requests).outputs
    texts = [target.tokenizer.decode(o.tokens, skip_special_tokens=True) for o in outputs]
    ended = [o.tokens[-1] in target.eos_ids for o in outputs]
    return [(_cleaned(str(text)), whole) for text, whole in zip(texts, ended, strict=True)]


def _cleaned(text: str) -> str:
    """Without the label that examples have and quotation marks around the whole."""
    return text.strip().removeprefix("Request:").strip().strip('"').strip()


def _fault(text: str, whole: bool, known: Sequence[str], max_similarity: float) -> str | None:
    """Why an instruction is not kept; None where it is."""
    words = text.split()
    if not whole:
        return "truncated"
    if not SHORTEST <= len(words) <= LONGEST:
        return "length"
    lowered = text.lower().split()
    if any(
        Indel.normalized_similarity(lowered, other.lower().split()) > max_similarity
        for other in known
    ):
        return "similar"
    return None


def _instruction(prompt: Prompt) -> str:
    return prompt.messages[-1]["content"]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
