"""How the engine's speed goes with the number of draft tokens, the batch and the context.

    python -m bench.growth --target T --draft D --out DIR

Writes growth.json and growth.png: tokens per second of decoding without the prefill, and
milliseconds of a plain step, a verify pass and a draft step. All points take turns, plain and
speculative, several times over, so that drift of the machine falls on all alike.
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.decoding import Generation, ModelDrafter, SpeculativeDecoder
from specdistill.models import LanguageModel, load
from specdistill.provenance import device_name, git_commit, versions


def sums_of(run: Generation) -> Counter[str]:
    """Tokens, target calls and draft steps, and seconds by part."""
    tokens = sum(len(output.tokens) for output in run.outputs)
    counts = {"tokens": tokens, "rounds": run.rounds, "draft_steps": run.draft_steps}
    return Counter(counts | run.seconds)


@dataclass
class Point:
    """One place on an axis, with batches of prompts for the turns, and the sums of what was
    measured there.
    """

    num: int
    batches: list[list[list[int]]]
    plain: Counter[str] = field(default_factory=Counter)
    speculative: Counter[str] = field(default_factory=Counter)

    def measure(self, target: LanguageModel, draft: LanguageModel, count: int, turn: int) -> None:
        """Decode plainly and with the draft, in an order that changes by the turn; the first turn
        is untimed and short.
        """
        prompts = self.batches[turn % len(self.batches)]
        batch = len(prompts)
        drafter = ModelDrafter(draft, target.vocab_size)
        decoders = [
            (self.plain, SpeculativeDecoder(target, batch_size=batch)),
            (
                self.speculative,
                SpeculativeDecoder(target, drafter, num_draft_tokens=self.num, batch_size=batch),
            ),
        ]
        for sums, decoder in decoders[:: 1 if turn % 2 else -1]:
            run = decoder.generate(prompts, max_new_tokens=count if turn else 4)
            if turn:
                sums.update(sums_of(run))

    def document(self) -> dict[str, float]:
        """Rates and milliseconds."""
        found: dict[str, float] = {
            "num_draft_tokens": self.num,
            "batch": len(self.batches[0]),
            "context": max(len(prompt) for prompts in self.batches for prompt in prompts),
            "plain_step_ms": 1e3 * self.plain["target"] / self.plain["rounds"],
            "verify_pass_ms": 1e3 * self.speculative["target"] / self.speculative["rounds"],
            "draft_step_ms": 1e3 * self.speculative["draft"] / self.speculative["draft_steps"],
        }
        for name, sums in (("plain", self.plain), ("speculative", self.speculative)):
            spent = sum(sums[part] for part in ("draft", "target", "verify", "other"))
            found[f"{name}_tokens_per_second"] = sums["tokens"] / spent
            found[f"{name}_prefill_seconds"] = sums["prefill"]
        return found


CURVES = {
    "tokens per second": {
        "plain_tokens_per_second": ("plain", "s--"),
        "speculative_tokens_per_second": ("speculative", "o-"),
    },
    "milliseconds": {
        "plain_step_ms": ("plain step", "s--"),
        "verify_pass_ms": ("verify pass", "o-"),
        "draft_step_ms": ("draft step", "^:"),
    },
}


def draw(axes: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    labels = {"num_draft_tokens": "draft tokens γ", "batch": "rows", "context": "prompt tokens"}
    for panel_row, (unit, curves) in zip(panels, CURVES.items(), strict=True):
        for panel, (axis, points) in zip(panel_row, axes.items(), strict=True):
            for name, (label, style) in curves.items():
                values = [point[name] for point in points]
                panel.plot([point[axis] for point in points], values, style, label=label)
            panel.set(xlabel=labels[axis], ylim=(0, None))
            panel.grid(alpha=0.3)
            if axis != "num_draft_tokens":
                panel.set_xscale("log", base=2)
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel_row[0].set_ylabel(unit)
        panel_row[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", default="demo:heldout")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    target, draft = load(given.target), load(given.draft)
    prompts = [encode_prompt(target.tokenizer, p) for p in load_prompts(given.prompts)]
    endless = [token for prompt in prompts for token in prompt]

    def batches(size: int) -> list[list[list[int]]]:
        return [prompts[i : i + size] for i in range(0, given.turns * size, size)]

    axes = {
        "num_draft_tokens": [Point(num, batches(1)) for num in given.draft_tokens],
        "batch": [Point(2, batches(size)) for size in given.batches],
        "context": [Point(4, [[endless[-length:]]]) for length in given.contexts],
    }
    for turn in range(given.turns + 1):
        for point in (point for points in axes.values() for point in points):
            point.measure(target, draft, given.max_new_tokens, turn)
    curves = {axis: [point.document() for point in points] for axis, points in axes.items()}
    document = {
        "device": device_name(target.device),
        "threads": given.threads,
        "versions": versions(),
        "git": git_commit(),
        "max_new_tokens": given.max_new_tokens,
        "turns": given.turns,
        "curves": curves,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "growth.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(curves, given.out / "growth.png")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
