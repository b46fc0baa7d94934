"""Answers of the target to a set of prompts, by the project's own batched engine, resumable."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from specdistill.data.chat import encode_prompt
from specdistill.data.filters import NO_FILTER, Filters, Sieve
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.data.signal import NONE, STATES, bytes_per_token, keep, kept_tokens
from specdistill.data.store import Example, Manifest, Store, tokenizer_sha256
from specdistill.decoding import GREEDY, Request, Sampling, SpeculativeDecoder
from specdistill.decoding.sampling import row_seed
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent

PART = 64  # answers a part


def signal_bytes(
    target: LanguageModel, prompts: int, max_new_tokens: int, signal: str = STATES
) -> int:
    """Upper bound of what the kept signal takes."""
    return prompts * max_new_tokens * bytes_per_token(target, signal)


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
    max_seconds: float | None = None,
    progress: Progress = silent,
) -> Store:
    """Answer every prompt not yet answered in `folder`. The same call again goes on where an
    interrupted one stopped. With several samplings each prompt gets one of them, by its id and
    the seed: a draft that will decode at two temperatures should see texts of both. After
    `max_seconds` what is finished is kept and the rest left unanswered. Answers that `filters`
    remove are asked for again, see there; the store counts them.

    Raises `StorageError` before any work where the disk cannot hold the signal, or `folder` holds
    other generations.
    """
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    kept_tokens(signal)  # a kind there is
    store = Store(
        folder, _manifest(target, prompts, max_new_tokens, samplings, seed, signal, filters)
    )
    by_id = {prompt.id: prompt for prompt in prompts}
    removals = Counter(id_ for id_, _ in store.manifest.removed)

    def pending() -> list[Request]:
        """What is to be asked next, of each open prompt once, in another way after a removal."""
        done = store.done()
        found = []
        for prompt in prompts:
            sampling = samplings[row_seed(seed, prompt.id) % len(samplings)]
            number = removals[prompt.id]
            if prompt.id not in done and number <= filters.retries_of(sampling):
                tokens = encode_prompt(target.tokenizer, prompt)
                own = seed if number == 0 else row_seed(seed, f"retry {number}")
                found.append(Request(prompt.id, tokens, max_new_tokens, sampling, own))
        # Neighbours share what they begin with; ids seed the draws.
        return sorted(found, key=lambda request: list(request.tokens))

    requests = pending()
    needed = signal_bytes(target, len(requests), max_new_tokens, signal)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the signal of {len(requests)} answers may take {needed:,} bytes, {folder} has "
            f"{free:,} free; keep no signal, "
            "shorten the answers or choose another disk"
        )
    decoder = SpeculativeDecoder(target, batch_size=batch_size, keep_hidden=signal != NONE)
    sieve = Sieve(filters, target.eos_ids, store.texts() if filters.duplicates else [])
    finished: list[Example] = []
    removed: list[tuple[str, str]] = []

    def flush() -> None:
        nonlocal finished, removed
        part, finished = finished, []  # so that an interrupt cannot write it again
        gone, removed = removed, []
        if part or gone:
            store.append(part, gone)

    tokens = settled = 0  # emitted in all, and by finished rows
    answered = len(prompts) - len(requests)
    start = time.perf_counter()

    def late() -> bool:
        return max_seconds is not None and time.perf_counter() - start > max_seconds

    try:
        while requests and not late():
            for ended, emitted in _rounds(decoder, requests, by_id):
                tokens += emitted
                for example, sampling in ended:
                    settled += len(example.response_tokens)
                    if (reason := sieve.reason(example.response_tokens)) is not None:
                        removed.append((example.id, reason))
                        removals[example.id] += 1
                        answered += removals[example.id] > filters.retries_of(sampling)
                        continue
                    if example.signal is not None:
                        example.signal = keep(target, **example.signal, signal=signal)
                    finished.append(example)
                    answered += 1
                if len(finished) + len(removed) >= PART:
                    flush()
                under_way = (tokens - settled) / max_new_tokens
                progress("generate", answered + under_way, len(prompts), f"{tokens:,} tokens")
                if late():
                    break
            flush()
            requests = pending()
    finally:  # on an interrupt, too, nothing finished is lost
        flush()
    return store


def _rounds(
    decoder: SpeculativeDecoder, requests: Sequence[Request], by_id: Mapping[str, Prompt]
) -> Iterator[tuple[list[tuple[Example, Sampling]], int]]:
    """For each round the answers it ended, with all states that were kept, and the tokens it
    emitted.
    """
    open_rows = {r.id: Example(r.id, list(r.tokens), [], by_id[r.id].category) for r in requests}
    samplings = {r.id: r.sampling for r in requests}
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {r.id: [] for r in requests}
    for round_ in decoder.stream(requests):
        ended = []
        for row in round_.rows:
            example = open_rows[row.request_id]
            example.response_tokens += row.tokens
            if row.hidden is not None and row.logsumexp is not None:
                pieces[row.request_id].append((row.hidden, row.logsumexp))
            if row.finished:
                if own := pieces.pop(row.request_id):
                    hidden, logsumexp = map(torch.cat, zip(*own, strict=True))
                    example.signal = {"hidden": hidden, "logsumexp": logsumexp}
                ended.append((open_rows.pop(row.request_id), samplings[row.request_id]))
        yield ended, sum(len(row.tokens) for row in round_.rows)


def _manifest(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    seed: int,
    signal: str,
    filters: Filters,
) -> Manifest:
    return Manifest(
        target=target.name,
        target_sha256=target.sha256(),
        tokenizer_sha256=tokenizer_sha256(target),
        prompts_sha256=prompts_sha256(prompts),
        settings={
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "dtype": str(target.dtype),
            "samplings": [asdict(sampling) for sampling in samplings],
            "filters": asdict(filters),
        },
        signal=signal,
    )
