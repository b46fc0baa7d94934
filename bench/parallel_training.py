"""What a training step of a parallel draft costs against the length of its blocks: time, memory and
rows of a pass, on texts of random tokens with a kept signal. The draft is two layers of the demo
target with 3,072 output tokens.

    python -m bench.parallel_training [--threads 1]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from functools import partial
from pathlib import Path

import torch

from specdistill import models
from specdistill.config import parse_config
from specdistill.data.signal import States
from specdistill.data.token_store import Example
from specdistill.drafts.making import make_draft
from specdistill.models import LanguageModel
from specdistill.training.batches import make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.pair import trainable
from specdistill.training.parallel import depths_of

BLOCKS = ({}, *({"num_draft_tokens": k} for k in (2, 4, 8, 16)), {"num_draft_tokens": 8, "keep": 1})
TEXTS = {"8 texts of 64 + 64 tokens": (8, 64, 64), "1 text of 512 + 512 tokens": (1, 512, 512)}
STEPS = 3  # the best counts


def texts(target: LanguageModel, num: int, prompt: int, response: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(100, 40000, (count,), generator=generator).tolist()

    made = [Example(str(i), tokens(prompt), tokens(response)) for i in range(num)]
    with torch.inference_mode():
        for example in made:
            rows = torch.tensor([example.prompt_tokens + example.response_tokens])
            hidden = target.hidden(rows)[0, prompt - 1 : -1].clone()
            example.signal = States(hidden, target.logits(hidden).logsumexp(-1))
    return made


def kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


def measured(target: LanguageModel, examples: list[Example], block: dict[str, float]) -> str:
    raw = {"target": "t", "draft": "d", "data": "a", "run_dir": "r", "decode": None}
    loss = {"loss": {"fkl": 1.0, "ce": 0.1}, "training": {"max_steps": 1}}
    config = parse_config(raw | loss | ({"parallel": block} if block else {}))
    draft = trainable(make_draft(target, 2, torch.arange(100, 3172)))
    distiller = Distiller(target, draft, config)
    make = partial(make_batch, examples, 0, draft.device)
    distiller.step([make(depths_of(config.parallel, "first"))], 1e-4)  # the optimiser's memory
    seconds, peaks, rows = [], [], 0
    for step in range(STEPS):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what is free would count as held
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = kilobytes("VmRSS"), time.perf_counter()
        batch = make(depths_of(config.parallel, str(step)))
        distiller.step([batch], 1e-4)
        seconds.append(time.perf_counter() - start)
        peaks.append(kilobytes("VmHWM") - before)
        rows = batch.tokens.numel() if batch.blocks is None else batch.blocks.places.numel()
    tokens = sum(len(e.response_tokens) for e in examples)
    name = f"K {block.get('num_draft_tokens', 1):>2}, keep {block.get('keep', 0.7):g}"
    speed = f"{min(seconds):6.2f} s, {tokens / min(seconds):5.0f} response tokens/s"
    return f"{name}: {rows:5d} rows, {speed}, peak {max(peaks) / 1024:5.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    target = models.load("demo:smollm2", dtype="float32")
    for name, sizes in TEXTS.items():
        print(name)
        examples = texts(target, *sizes)
        for block in BLOCKS:
            print("  " + measured(target, examples, block), flush=True)


if __name__ == "__main__":
    main()
