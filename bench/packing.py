"""Packed rows against batches of like length: training tokens a second, in turns, and the memory of
each in a process of its own. `python -m bench.packing`, `python -m bench.packing packed` for one.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdistill.config import parse_config
from specdistill.data.signal import States
from specdistill.data.token_store import Example
from specdistill.models import LanguageModel
from specdistill.training.batches import length_buckets, make_batch, packed_rows
from specdistill.training.distiller import Distiller

WIDTH, VOCABULARY, TURNS, UPDATES = 256, 8192, 5, 4
KINDS = {"buckets": length_buckets, "packed": packed_rows}
CPU = torch.device("cpu")


def model(layers: int) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LanguageModel("random", Path(), made, None)  # type: ignore[arg-type]


def answers(count: int) -> list[Example]:
    """Prompts of 20 to 80 tokens, answers whose lengths spread as those of chats do (log-normal,
    median 90), with the target's states.
    """
    rng = random.Random(0)
    examples = []
    for i in range(count):
        prompt, response = rng.randint(20, 80), min(int(rng.lognormvariate(4.5, 0.7)) + 4, 440)
        tokens = [rng.randrange(VOCABULARY) for _ in range(prompt + response)]
        signal = States(torch.randn(response, WIDTH), torch.full((response,), 9.0))
        examples.append(Example(str(i), tokens[:prompt], tokens[prompt:], signal=signal))
    return examples


def main(only: str | None) -> None:
    torch.set_num_threads(1)
    examples = answers(400)
    real = {e.id: len(e.prompt_tokens) + len(e.response_tokens) for e in examples}
    for batch_tokens in (512, 2048):
        training = {"max_steps": 1, "batch_tokens": batch_tokens}
        names = {"target": "t", "draft": "d", "data": "a", "run_dir": "r"}
        config = parse_config({**names, "decode": None, "training": training})
        distiller = Distiller(model(4), model(2), config)
        speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(TURNS):
            for kind, groups_of in KINDS.items():
                if only not in (None, kind):
                    continue
                groups = groups_of(examples, batch_tokens, 0, turn)
                start, tokens = time.perf_counter(), 0
                for group in groups[:UPDATES]:
                    distiller.step([make_batch(group, 0, CPU, packed=kind == "packed")], 1e-4)
                    tokens += sum(real[e.id] for e in group)
                speeds[kind].append(tokens / (time.perf_counter() - start))
        for kind, groups_of in KINDS.items():
            batches = [
                make_batch(group, 0, CPU, packed=kind == "packed").tokens.numel()
                for group in groups_of(examples, batch_tokens, 0, 0)
            ]
            padding = 1 - sum(real.values()) / sum(batches)
            speed = f"{median(speeds[kind]):,.0f} tokens/s" if speeds[kind] else ""
            print(f"{batch_tokens} {kind}: {speed}, {padding:.1%} padding, {len(batches)} passes")
    if only is None:
        for kind in KINDS:
            subprocess.run([sys.executable, "-m", "bench.packing", kind], check=True)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{only}: peak {peak:,.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
