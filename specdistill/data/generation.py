"""Answers of the target to a set of prompts, by the project's own batched engine, resumable."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdistill.data.chat import encode_prompt
from specdistill.data.filters import DUPLICATE, NO_FILTER, Answer, Filters, repeated
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.data.questions import Decoder, Question, round_seed, rounds
from specdistill.data.scorers import BestOf, Candidate
from specdistill.data.selection import Selection
from specdistill.data.signal import (
    NONE,
    STATES,
    bytes_per_token,
    keep,
    kept_tokens,
    read_states,
    token_log_probs,
)
from specdistill.data.token_store import Example, Manifest, Store, read_examples, tokenizer_sha256
from specdistill.decoding import GREEDY, ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.decoding.sampling import own_sampling
from specdistill.errors import InputError, StorageError
from specdistill.files import holding
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent

PART = 64  # answers a part


def signal_bytes(
    target: LanguageModel, answers: int, max_new_tokens: int, signal: str = STATES
) -> int:
    """Upper bound of what the kept signal takes."""
    return answers * max_new_tokens * bytes_per_token(target, signal)


@holding("folder")
def generate(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling] = (GREEDY,),
    seed: int = 0,
    batch_size: int = 32,
    signal: str = STATES,
    filters: Filters = NO_FILTER,
    best_of: BestOf | None = None,
    writer: LanguageModel | None = None,
    draft: LanguageModel | None = None,
    num_draft_tokens: int = 0,
    outside: tuple[str, Decoder] | None = None,
    max_seconds: float | None = None,
    progress: Progress = silent,
) -> Store:
    """Answer every prompt not yet answered in `folder`. The same call again goes on where an
    interrupted one stopped. With several samplings each prompt gets one of them, by its id and
    the seed: a draft that will decode at two temperatures should see texts of both. After
    `max_seconds`, once there is an answer, what is finished is kept and the rest left unanswered.
    Of `best_of` answers that `filters` leave, the best is kept; a prompt none of whose answers is
    left is asked again, see `Filters`, and the store counts them. Duplicates are looked for among
    all that is kept, whenever every prompt has been asked. A `draft` that proposes
    `num_draft_tokens` a round saves time, see `gain.py`, and changes nothing of what the target may
    say. Where a cheaper `writer` of the target's tokens answers in its place, the target only reads
    what is kept, for its signal. An `outside` engine, with its name, decodes in place of ours.

    Raises `InputError` for a writer with a trimmed vocabulary, and `StorageError` before any work
    where the disk cannot hold the signal, or `folder` holds other generations.
    """
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    kept_tokens(signal)  # a kind there is
    if writer is not None and writer.vocab is not None:
        raise InputError(
            f"{writer.name} has a trimmed vocabulary, so it cannot write all that {target.name} "
            "can; let a model with the whole vocabulary answer"
        )
    author = target if writer is None else writer
    selection = Selection.checked(filters, best_of, prompts, samplings)
    number, scored = selection.number, selection.reads_log_probability
    settings = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "dtype": str(target.dtype),
        "samplings": [asdict(sampling) for sampling in samplings],
        **selection.settings,
        **({} if writer is None else {"writer": [writer.name, writer.sha256()]}),
        **({} if draft is None else {"draft": [draft.sha256(), num_draft_tokens]}),
        **({} if outside is None else {"engine": outside[0]}),
    }
    manifest = _manifest(target, prompts, settings, signal)
    manifest.writer_parameters = None if writer is None else writer.parameters()
    store = Store(folder, manifest)
    removals = Counter(id_ for id_, _ in store.manifest.removed)

    def retried(id_: str) -> bool:
        return removals[id_] <= filters.retries_of(own_sampling(samplings, seed, id_))

    def pending() -> list[Question]:
        """What is to be asked next, of each open prompt once, in another way after a removal."""
        done = store.done()
        found = []
        for prompt in prompts:
            if prompt.id not in done and retried(prompt.id):
                tokens = encode_prompt(target.tokenizer, prompt)
                own = round_seed(seed, removals[prompt.id])
                sampling = own_sampling(samplings, seed, prompt.id)
                found.append(Question(prompt, tokens, sampling, own))
        # Neighbours share what they begin with; ids seed the draws.
        found.sort(key=lambda question: question.tokens)
        # What there may be no time for is every n-th of them, not one task.
        turns = 1 if max_seconds is None else max(len(found) // batch_size, 1)
        return [question for first in range(turns) for question in found[first::turns]]

    def drop_duplicates() -> int:
        """Take back all equal answers but the first, in an order of their own, and not that in
        which they ended: an interrupt changes that. Returns how many are to be asked for again.
        """
        if not filters.duplicates or not store.manifest.parts:
            return 0
        kept = read_examples(folder, signal=False)
        kept.sort(key=lambda answer: (removals[answer.id], answer.id))
        again = repeated((answer.id, answer.response_tokens) for answer in kept)
        store.withdraw(again, DUPLICATE)
        removals.update(again)
        return sum(map(retried, again))

    drop_duplicates()  # of a run that was killed before it came to it
    questions = pending()
    needed = signal_bytes(target, len(questions) * filters.written, max_new_tokens, signal)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the signal of {len(questions)} answers may take {needed:,} bytes, {folder} has "
            f"{free:,} free; keep no signal, "
            "shorten the answers or choose another disk"
        )
    decoder: Decoder
    if outside is not None:
        _, decoder = outside
    else:
        decoder = SpeculativeDecoder(
            author,
            None if draft is None else ModelDrafter(draft, author.vocab_size),
            num_draft_tokens=num_draft_tokens,
            batch_size=batch_size,
            keep_hidden=scored or (signal != NONE and writer is None),
        )
    finished: list[Example] = []
    removed: list[tuple[str, str]] = []
    passed_over: Counter[str] = Counter()

    def flush() -> None:
        nonlocal finished, removed, passed_over
        part, finished = finished, []  # so that an interrupt cannot write it again
        gone, removed = removed, []
        others, passed_over = passed_over, Counter()
        if part or gone:
            store.append(part, gone, others)

    def choose(prompt: Prompt, answers: list[Example]) -> tuple[Example | None, list[str]]:
        """The answer that is kept, if one is, and why others are not."""
        seen = [Answer(t, t[-1] in target.eos_ids) for t in (a.response_tokens for a in answers)]
        place, gone = selection.choose(
            prompt, seen, lambda place: _candidate(author, answers[place], scored)
        )
        return (None if place is None else answers[place]), gone

    tokens = settled = 0  # emitted in all, and by finished rows
    answered = len(prompts) - len(questions)
    start = time.perf_counter()

    def late() -> bool:
        """Out of time, with something to show for it."""
        if max_seconds is None or not answered:
            return False
        return time.perf_counter() - start > max_seconds

    if answered:
        progress("generate", answered, len(prompts), f"{answered} were answered before")
    try:
        while questions and not late():
            for ended, round_ in rounds(decoder, questions, number, max_new_tokens):
                tokens += sum(len(row.tokens) for row in round_.rows)
                store.decoding_seconds += sum(round_.seconds.values())
                for question, answers in ended:
                    settled += sum(len(answer.response_tokens) for answer in answers)
                    id_ = question.prompt.id
                    kept, gone = choose(question.prompt, answers)
                    if kept is None:
                        removed.append((id_, gone[0]))
                        passed_over.update(gone[1:])
                        removals[id_] += 1
                        answered += not retried(id_)
                        continue
                    raw, kept.signal = kept.signal, None
                    if signal != NONE:
                        if raw is None or writer is not None:
                            raw = read_states(target, kept.prompt_tokens, kept.response_tokens)
                        kept.signal = keep(target, **raw, signal=signal)
                    finished.append(kept)
                    passed_over.update(gone)
                    answered += 1
                if len(finished) + len(removed) >= PART:
                    flush()
                under_way = (tokens - settled) / (max_new_tokens * number)
                progress("generate", answered + under_way, len(prompts), f"{tokens:,} tokens")
                if late():
                    break
            flush()
            answered -= drop_duplicates()
            questions = pending()
        if questions:
            progress("generate", len(prompts), len(prompts), f"out of time, {answered} answers")
    finally:  # on an interrupt, too, nothing finished is lost
        flush()
    return store


def _candidate(author: LanguageModel, answer: Example, scored: bool) -> Candidate:
    text = str(author.tokenizer.decode(answer.response_tokens, skip_special_tokens=True))
    if not scored:
        return Candidate(text)
    if answer.signal is None:  # an outside engine gives none
        answer.signal = read_states(author, answer.prompt_tokens, answer.response_tokens)
    log_probs = token_log_probs(author, **answer.signal, tokens=answer.response_tokens)
    return Candidate(text, log_probs.mean().item())


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
    )
