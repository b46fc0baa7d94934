"""Answers of the target to prompts, by our batched engine or one in its place, resumable."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from specdistill.data.chat import encode_prompt
from specdistill.data.filters import DUPLICATE, NO_FILTER, Filters, Judged, repeated
from specdistill.data.outside import Loader, Outside, OutsideDecoder
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.data.questions import AnyDecoder, Question, round_seed, rounds
from specdistill.data.rereading import Rereading
from specdistill.data.rewriting import rewriting
from specdistill.data.scorers import BestOf, Candidate, matched_number
from specdistill.data.selection import Selection
from specdistill.data.settings import distinct, settings_of
from specdistill.data.signal import (
    NONE,
    STATES,
    States,
    TopK,
    bytes_per_token,
    keep,
    kept_tokens,
    read_states,
    token_log_probs,
)
from specdistill.data.token_store import Example, Manifest, Store, read_examples, tokenizer_sha256
from specdistill.decoding import Sampling, SpeculativeDecoder
from specdistill.decoding.sampling import own_sampling
from specdistill.errors import InputError, StorageError
from specdistill.files import holding
from specdistill.models import LanguageModel, check_pair
from specdistill.progress import Note, Pace, Progress, silent, unsaid

PART = 64  # answers a part


def signal_bytes(
    target: LanguageModel, answers: int, max_new_tokens: int, signal: str = STATES
) -> int:
    """Upper bound of what the kept signal takes."""
    return answers * max_new_tokens * bytes_per_token(target, signal)


@holding("folder")
def generate(
    target: LanguageModel | Loader,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    max_new_tokens: int = 256,
    temperature: float | Sequence[float] | None = None,
    samplings: Sequence[Sampling] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    signal: str = STATES,
    filters: Filters = NO_FILTER,
    best_of: BestOf | None = None,
    writer: LanguageModel | Loader | None = None,
    match: Literal["compute"] | float | None = None,
    outside: Outside | None = None,
    max_seconds: float | None = None,
    progress: Progress = silent,
    note: Note = unsaid,
) -> Store:
    """Answer every prompt not yet answered in `folder`. The same call again goes on where an
    interrupted one stopped. With several temperatures, or samplings in their place, each prompt
    gets one of them, by its id and the seed: a draft that will decode at two temperatures should
    see texts of both. After `max_seconds`, once there is an answer, what is finished is kept and
    the rest left unanswered.

    Of `best_of` answers that `filters` leave, the best is kept; a prompt none of whose answers is
    left is asked again, see `Filters`, and the store counts them. Duplicates are looked for among
    all that is kept, whenever every prompt has been asked. Where a cheaper `writer` of the target's
    tokens answers in its place, the target only reads what is kept, for its signal; with `match`
    the writer gives as many answers as cost what `best_of` of the target do, by "compute" or where
    one of the target's costs so many of its own. An `outside` engine decodes in place of ours; then
    `target` may lack its body, if the engine tells the signal. `note` is told what cache and signal
    take. Models that are given as functions are loaded once nobody else is at work in `folder`, and
    all else is checked.

    Raises `InputError` for a writer with a trimmed vocabulary, and `StorageError` before any work
    where the disk cannot hold the signal, or `folder` holds other generations.
    """
    folder, samplings = Path(folder), _samplings(temperature, samplings)
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    if match is not None and (writer is None or best_of is None):
        raise InputError(f"match: {match} has no effect without a writer and best_of")
    kept_tokens(signal)  # a kind there is
    selection = Selection.checked(filters, best_of, prompts, samplings)
    target = target if isinstance(target, LanguageModel) else target()
    author = target if writer is None else _writer(writer, target)
    if match is not None and best_of is not None:
        matched = _matched(best_of, match, target, author, note)
        selection = replace(selection, best_of=matched)
    settings = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "dtype": str(target.dtype),
        "samplings": [asdict(sampling) for sampling in samplings],
        **selection.settings,
        **({} if writer is None else {"writer": [author.name, author.sha256()]}),
        **({} if outside is None else {"engine": outside.name, **outside.settings}),
    }
    manifest = _manifest(target, prompts, settings, signal)
    manifest.writer_parameters = None if writer is None else author.parameters()
    other = rereading = None
    if outside is not None:
        other = outside.decoder(author, batch_size)
        rereading = outside.reader and Rereading(outside.reader, outside.name)
    decoder: AnyDecoder = other or SpeculativeDecoder(
        author,
        batch_size=batch_size,
        timed=False,
        keep_hidden=selection.reads_log_probability or (signal != NONE and writer is None),
    )
    questions = {
        p.id: Question(p, _tokens(target, p, max_new_tokens), own_sampling(samplings, seed, p.id))
        for p in prompts
    }
    if words := rewriting(target.tokenizer, prompts):
        note(words)
    asking = _Asking(
        target,
        author,
        decoder,
        Store(folder, manifest),
        questions,
        seed,
        selection,
        max_new_tokens,
        batch_size,
        max_seconds,
        progress,
        other,
        rereading,
    )
    asking.drop_duplicates()  # of a run that was killed before it came to it
    open_ = asking.open()
    asking.check_space(open_, note)
    if open_ and isinstance(decoder, SpeculativeDecoder):
        requests = [r for q in open_ for r in q.requests(selection.number, max_new_tokens)]
        note(decoder.cache_size(requests).line)
    asking.all(open_)
    if rereading is not None and rereading.line:
        note(rereading.line)
    return asking.store


def _matched(
    best_of: BestOf,
    match: Literal["compute"] | float,
    target: LanguageModel,
    author: LanguageModel,
    note: Note,
) -> BestOf:
    """As many answers of the author as cost what `best_of` of the target do."""
    ratio = target.parameters() / author.parameters() if match == "compute" else match
    matched = replace(best_of, number=matched_number(best_of.number, ratio))
    note(f"{matched.number} answers of {author.name} for {best_of.number} of the target's")
    return matched


@dataclass
class _Asking:
    """One call of `generate`: what is asked, and what has ended and is not yet written."""

    target: LanguageModel
    author: LanguageModel
    decoder: AnyDecoder
    store: Store
    questions: Mapping[str, Question]
    seed: int
    selection: Selection
    max_new_tokens: int
    batch_size: int
    max_seconds: float | None
    progress: Progress
    outside: OutsideDecoder | None
    rereading: Rereading | None

    def __post_init__(self) -> None:
        self.removals = Counter(id_ for id_, _ in self.store.manifest.removed)
        self.answered = 0
        self.start = time.perf_counter()
        self._begin_part()

    def _begin_part(self) -> None:
        self.finished: list[Example] = []
        self.removed: list[tuple[str, str]] = []
        self.passed_over: Counter[str] = Counter()

    def retried(self, id_: str) -> bool:
        """Whether a prompt that has no answer is asked, for the first time or again."""
        retries = self.selection.filters.retries_of(self.questions[id_].sampling)
        return self.removals[id_] <= retries

    def open(self) -> list[Question]:
        """What is to be asked next, of each open prompt once, in another way after a removal."""
        done = self.store.done()
        refused = {} if self.outside is None else self.outside.refused
        waiting = [
            replace(question, seed=round_seed(self.seed, self.removals[id_]))
            for id_, question in self.questions.items()
            if id_ not in done and id_ not in refused and self.retried(id_)
        ]
        # Neighbours share what they begin with; ids seed the draws.
        waiting.sort(key=lambda question: question.tokens)
        # What there may be no time for is every n-th of them, not one task.
        turns = 1 if self.max_seconds is None else max(len(waiting) // self.batch_size, 1)
        return [question for first in range(turns) for question in waiting[first::turns]]

    def check_space(self, questions: Sequence[Question], note: Note) -> None:
        """Raises `StorageError` where the disk cannot hold the signal."""
        store = self.store
        number = len(questions) * self.selection.filters.written
        signal = store.manifest.signal
        needed = signal_bytes(self.target, number, self.max_new_tokens, signal)
        free = shutil.disk_usage(store.folder).free
        if needed > free:
            raise StorageError(
                f"the signal of {len(questions)} answers may take {needed:,} bytes, {store.folder} "
                f"has {free:,} free; keep no signal, shorten the answers or choose another disk"
            )
        if needed:
            note(
                f"the signal of {len(questions)} answers takes at most {needed:,} bytes in "
                f"{store.folder}, {needed // (number * self.max_new_tokens):,} a token"
            )

    def all(self, questions: list[Question]) -> None:
        """Until no question is open, or the time is up."""
        total = len(self.questions)
        self.answered = total - len(questions)
        if self.answered:
            self.progress("generate", self.answered, total, f"{self.answered} were answered before")
        try:
            while questions and not self.late():
                self.ask(questions)
                self.flush()
                self.answered -= self.drop_duplicates()
                questions = self.open()
            if questions:
                self.progress("generate", total, total, f"out of time, {self.answered} answers")
        finally:  # on an interrupt, too, nothing finished is lost
            self.flush()

    def late(self) -> bool:
        """Out of time, with something to show for it."""
        if self.max_seconds is None or not self.answered:
            return False
        return time.perf_counter() - self.start > self.max_seconds

    def ask(self, questions: Sequence[Question]) -> None:
        number, longest = self.selection.number, self.max_new_tokens
        tokens = settled = 0  # emitted in all, and by finished rows
        total, pace = len(self.questions), Pace()
        for ended, round_ in rounds(self.decoder, questions, number, longest):
            tokens += sum(len(row.tokens) for row in round_.rows)
            for question, answers in ended:
                settled += sum(len(answer.response_tokens) for answer in answers)
                self.settle(question, answers)
            if len(self.finished) + len(self.removed) >= PART:
                self.flush()
            under_way = (tokens - settled) / (longest * number)
            done = self.answered + under_way
            words = f"{tokens:,} tokens{pace.words(tokens, done, total)}"
            self.progress("generate", done, total, words)
            if self.late():
                break

    def settle(self, question: Question, answers: list[Example]) -> None:
        """Keep the best of a prompt's answers, with its signal, or ask again."""
        id_ = question.prompt.id
        best, gone = self.choose(question.prompt, answers)
        if best is None:
            self.removed.append((id_, gone[0]))
            self.passed_over.update(gone[1:])
            self.removals[id_] += 1
            self.answered += not self.retried(id_)
            return
        known, best.signal = best.signal, None
        if (signal := self.store.manifest.signal) != NONE:
            if isinstance(known, TopK):
                best.signal = known
            else:
                if not isinstance(known, States) or self.author is not self.target:
                    known = read_states(self.target, best.prompt_tokens, best.response_tokens)
                best.signal, best.alpha_cost = keep(self.target, known, signal)
            if self.rereading is not None:
                self.rereading.see(best)
        self.finished.append(best)
        self.passed_over.update(gone)
        self.answered += 1

    def choose(self, prompt: Prompt, answers: list[Example]) -> tuple[Example | None, list[str]]:
        """The answer that is kept, if one is, and why others are not."""
        ends, scored = self.target.eos_ids, self.selection.reads_log_probability
        seen = [Judged(t, t[-1] in ends) for t in (a.response_tokens for a in answers)]
        place, gone = self.selection.choose(
            prompt, seen, lambda place: _candidate(self.author, answers[place], scored)
        )
        return (None if place is None else answers[place]), gone

    def flush(self) -> None:
        part, removed, passed_over = self.finished, self.removed, self.passed_over
        self._begin_part()  # so that an interrupt cannot write it again
        if (part or removed) and self.outside is not None:
            known = self.store.manifest.engine or {}
            figures = self.rereading and self.rereading.figures
            self.store.manifest.engine = {**known, **self.outside.facts, **(figures or {})}
        if part or removed:
            self.store.append(part, removed, passed_over)

    def drop_duplicates(self) -> int:
        """Take back all equal answers but the first, in an order of their own, and not that in
        which they ended: an interrupt changes that. Returns how many are to be asked for again.
        """
        if not self.selection.filters.duplicates or not self.store.manifest.parts:
            return 0
        answers = read_examples(self.store.folder, signal=False)
        answers.sort(key=lambda answer: (self.removals[answer.id], answer.id))
        again = repeated((answer.id, answer.response_tokens) for answer in answers)
        self.store.withdraw(again, DUPLICATE)
        self.removals.update(again)
        return sum(map(self.retried, again))


def _tokens(target: LanguageModel, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """Raises `InputError` where the target cannot read so much, as `encode_prompt` does."""
    tokens = encode_prompt(target.tokenizer, prompt)
    if len(tokens) + max_new_tokens > target.max_length:
        raise InputError(
            f"{prompt.named} has {len(tokens)} tokens and up to {max_new_tokens} new ones, and "
            f"{target.name} reads {target.max_length} positions; take shorter conversations, "
            "fewer new tokens, or a target that reads more"
        )
    return tokens


def _writer(writer: LanguageModel | Loader, target: LanguageModel) -> LanguageModel:
    """Raises `InputError` for a model that cannot write what the target can."""
    writer = writer if isinstance(writer, LanguageModel) else writer()
    if writer.vocab is not None:
        raise InputError(
            f"{writer.name} has a trimmed vocabulary, so it cannot write all that {target.name} "
            "can; let a model with the whole vocabulary answer"
        )
    check_pair(target, writer)
    return writer


def _candidate(author: LanguageModel, answer: Example, scored: bool) -> Candidate:
    text = str(author.tokenizer.decode(answer.response_tokens, skip_special_tokens=True))
    if not scored:
        return Candidate(text)
    if answer.log_prob is not None:
        return Candidate(text, answer.log_prob / len(answer.response_tokens))
    states = answer.signal
    if not isinstance(states, States):  # an outside engine gives none
        states = read_states(author, answer.prompt_tokens, answer.response_tokens)
        answer.signal = states
    log_probs = token_log_probs(author, states, answer.response_tokens)
    return Candidate(text, log_probs.mean().item())


def _samplings(
    temperature: float | Sequence[float] | None, samplings: Sequence[Sampling] | None
) -> Sequence[Sampling]:
    if samplings is None:
        several = temperature if isinstance(temperature, Sequence) else [temperature or 0.0]
        return [Sampling(value) for value in several]
    if temperature is not None:
        raise InputError("samplings have temperatures of their own; give one of the two")
    return samplings


def _manifest(
    target: LanguageModel, prompts: Sequence[Prompt], settings: dict[str, Any], signal: str
) -> Manifest:
    return Manifest(
        target=target.name,
        target_sha256=target.sha256(),
        tokenizer_sha256=tokenizer_sha256(target),
        prompts_sha256=prompts_sha256(prompts),
        settings=settings,
        signal=signal,
        chat_template_kwargs=distinct(map(settings_of, prompts)),
    )
