"""Answers for training: `specdistill generate` against Transformers' `generate` in batches, on the
same prompts and lengths, greedily.

    python -m bench.against_generate --limit 48 --turns 3

Ours writes its folder each time, with the target's states and without; Transformers gets its
prompts ordered by length, so that batches have little padding, and writes nothing. All sides run
in one process and take turns over all prompts; the reading of the models is not timed. The last
line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from bench.bench_decoding import transformers
from specdistill.data.chat import encode_prompt
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.signal import NONE, STATES
from specdistill.data.token_store import read_examples
from specdistill.models import LanguageModel, load
from specdistill.provenance import device_name, git_commit, versions

Answers = dict[str, list[int]]
STOCK = "Transformers"


def ours(target: LanguageModel, prompts: list[Prompt], **settings: Any) -> Answers:
    with tempfile.TemporaryDirectory() as folder:
        generate(target, prompts, Path(folder) / "data", **settings)
        found = read_examples(Path(folder) / "data", signal=False)
    return {e.id: e.response_tokens for e in found}


def theirs(
    target: LanguageModel, prompts: list[Prompt], *, batch_size: int, max_new_tokens: int
) -> Answers:
    tokens = {p.id: encode_prompt(target.tokenizer, p) for p in prompts}
    ids = sorted(tokens, key=lambda id_: len(tokens[id_]))
    run = transformers(target, batch=batch_size)
    return dict(zip(ids, run([tokens[id_] for id_ in ids], max_new_tokens), strict=True))


def sides(stock: LanguageModel, target: LanguageModel) -> dict[str, Callable[..., Answers]]:
    return {
        STOCK: partial(theirs, stock),
        "generate --signal none": partial(ours, target, signal=NONE),
        "generate": partial(ours, target, signal=STATES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--prompts", default="demo:train")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    stock, target = (load(given.target, dtype=given.dtype) for _ in range(2))
    prompts = load_prompts(given.prompts, limit=given.limit)
    document: dict[str, Any] = {
        "device": device_name(target.device),
        "threads": given.threads,
        "dtype": str(target.dtype).removeprefix("torch."),
        "versions": versions(),
        "git": git_commit(),
        "prompts": len(prompts),
        "max_new_tokens": given.max_new_tokens,
        "batch_sizes": {},
    }
    for batch in given.batch_sizes:
        contenders = sides(stock, target)
        names, speeds = list(contenders), {name: [] for name in contenders}
        answers: dict[str, Answers] = {}
        how = {"batch_size": batch, "max_new_tokens": given.max_new_tokens}
        for run in contenders.values():  # untimed, for what a first run sets up
            run(prompts[:batch], batch_size=batch, max_new_tokens=4)
        for turn in range(given.turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                answers[name] = contenders[name](prompts, **how)
                seconds = time.perf_counter() - start
                speeds[name].append(sum(map(len, answers[name].values())) / seconds)
        print(f"\n{batch} rows")
        rows = {}
        for name, found in speeds.items():
            ratios = [a / b for a, b in zip(found, speeds[STOCK], strict=True)]
            same = sum(answers[name][id_] == text for id_, text in answers[STOCK].items())
            rows[name] = {"tokens_per_second": found, "over_stock": ratios, "identical": same}
            words = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times {STOCK}"
            words += f"; {same} of {len(prompts)} texts identical"
            print(f"{name:24} {median(found):7.1f} tokens/s, {words}")
        document["batch_sizes"][batch] = rows
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
