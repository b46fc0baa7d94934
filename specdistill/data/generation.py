"""Answers of the target to a set of prompts, by the project's own batched engine, resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import Prompt
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
    max_seconds: float | None = None,
    progress: Progress = silent,
) -> Store:
    """Answer every prompt not yet answered in `folder`. The same call again goes on where an
    interrupted one stopped. With several samplings each prompt gets one of them, by its id and
    the seed: a draft that will decode at two temperatures should see texts of both. After
    `max_seconds` what is finished is kept and the rest left unanswered.

    Raises `StorageError` before any work where the disk cannot hold the signal, or `folder` holds
    other generations.
    """
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    kept_tokens(signal)  # a kind there is
    store = Store(folder, _manifest(target, prompts, max_new_tokens, samplings, seed, signal))
    done = store.done()
    by_id = {prompt.id: prompt for prompt in prompts}
    requests = [
        Request(
            prompt.id,
            encode_prompt(target.tokenizer, prompt),
            max_new_tokens,
            samplings[row_seed(seed, prompt.id) % len(samplings)],
            seed,
        )
        for prompt in prompts
        if prompt.id not in done
    ]
    requests.sort(
        key=lambda request: list(request.tokens)
    )  # neighbours share what they begin with; ids seed the draws
    needed = signal_bytes(target, len(requests), max_new_tokens, signal)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the signal of {len(requests)} answers may take {needed:,} bytes, {folder} has "
            f"{free:,} free; keep no signal, "
            "shorten the answers or choose another disk"
        )
    decoder = SpeculativeDecoder(target, batch_size=batch_size, keep_hidden=signal != NONE)
    open_rows = {r.id: Example(r.id, list(r.tokens), [], by_id[r.id].category) for r in requests}
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {r.id: [] for r in requests}
    finished: list[Example] = []
    tokens = settled = 0  # emitted in all, and by finished rows
    answered = len(done)
    start = time.perf_counter()
    try:
        for round_ in decoder.stream(requests):
            for row in round_.rows:
                example = open_rows[row.request_id]
                example.response_tokens += row.tokens
                tokens += len(row.tokens)
                if row.hidden is not None and row.logsumexp is not None:
                    pieces[row.request_id].append((row.hidden, row.logsumexp))
                if row.finished:
                    if signal != NONE:
                        hidden, lse = map(torch.cat, zip(*pieces.pop(row.request_id), strict=True))
                        example.signal = keep(target, hidden, lse, signal)
                    finished.append(open_rows.pop(row.request_id))
                    settled += len(example.response_tokens)
                    answered += 1
            if len(finished) >= PART:
                part, finished = finished, []  # so that `finally` cannot write it again
                store.append(part)
            under_way = (tokens - settled) / max_new_tokens
            progress("generate", answered + under_way, len(prompts), f"{tokens:,} tokens")
            if max_seconds is not None and time.perf_counter() - start > max_seconds:
                break
    finally:  # on an interrupt, too, nothing finished is lost
        if finished:
            store.append(finished)
    return store


def _manifest(
    target: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    seed: int,
    signal: str,
) -> Manifest:
    asked = json.dumps([[p.id, list(p.messages)] for p in prompts])
    return Manifest(
        target=target.name,
        target_sha256=target.sha256(),
        tokenizer_sha256=tokenizer_sha256(target),
        prompts_sha256=hashlib.sha256(asked.encode()).hexdigest(),
        settings={
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "dtype": str(target.dtype),
            "samplings": [asdict(sampling) for sampling in samplings],
        },
        signal=signal,
    )
