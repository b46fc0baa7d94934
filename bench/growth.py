"""How the engine's speed goes with the number of draft tokens, the batch and the context.

    python -m bench.growth --target T --draft D --out DIR

Writes growth.json and growth.png. Plain and speculative decoding take turns; the speed is that of
decoding, tokens per second without the prefill, which has a curve of its own.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.decoding import Generation, ModelDrafter, SpeculativeDecoder
from specdistill.models import LanguageModel, load
from specdistill.packing import pack
from specdistill.provenance import device_name, git_commit, versions

Point = dict[str, float]


def speed(run: Generation) -> tuple[int, float, float]:
    """Tokens emitted, seconds of decoding, seconds of prefill."""
    tokens = sum(len(output.tokens) for output in run.outputs)
    return tokens, sum(run.seconds.values()) - run.seconds["prefill"], run.seconds["prefill"]


def measure(
    target: LanguageModel,
    draft: LanguageModel,
    groups: Iterable[list[list[int]]],
    num: int,
    batch: int,
    count: int,
) -> Point:
    pack(target, batch * (num + 1))
    pack(draft, 2 * batch)
    drafter = ModelDrafter(draft, target.vocab_size)
    decoders = {
        "plain": SpeculativeDecoder(target, batch_size=batch),
        "speculative": SpeculativeDecoder(target, drafter, num_draft_tokens=num, batch_size=batch),
    }
    sums = {name: [0, 0.0, 0.0] for name in decoders}
    context = 0
    for i, group in enumerate(groups):
        context = max(context, *map(len, group))
        names = list(decoders)[:: 1 if i % 2 else -1]
        for name in names:
            if i == 0:  # untimed
                decoders[name].generate(group, max_new_tokens=4)
            parts = speed(decoders[name].generate(group, max_new_tokens=count))
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)]
    point = {"num_draft_tokens": num, "batch": batch, "context": context}
    for name, (tokens, seconds, prefill) in sums.items():
        point[f"{name}_tokens_per_second"] = tokens / seconds
        point[f"{name}_prefill_seconds"] = prefill
    return point


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    labels = {"num_draft_tokens": "draft tokens γ", "batch": "rows", "context": "prompt tokens"}
    for panel, (axis, points) in zip(panels, curves.items(), strict=True):
        for name, style in (("plain", "s--"), ("speculative", "o-")):
            values = [point[f"{name}_tokens_per_second"] for point in points]
            panel.plot([point[axis] for point in points], values, style, label=name)
        panel.set(xlabel=labels[axis], ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens per second")
    for panel in panels[1:]:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", default="demo:heldout")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    target, draft = load(given.target), load(given.draft)
    prompts = [encode_prompt(target.tokenizer, p) for p in load_prompts(given.prompts)]
    endless = [token for prompt in prompts for token in prompt]
    count = given.max_new_tokens

    def grouped(batch: int, groups: int = 2) -> list[list[list[int]]]:
        wanted = prompts[: groups * batch]
        return [wanted[i : i + batch] for i in range(0, len(wanted), batch)]

    curves = {
        "num_draft_tokens": [
            measure(target, draft, grouped(1, 4), num, 1, count) for num in given.draft_tokens
        ],
        "batch": [measure(target, draft, grouped(b), 4, b, count) for b in given.batches],
        "context": [
            measure(target, draft, [[endless[-n:]]] * 2, 4, 1, count) for n in given.contexts
        ],
    }
    document = {
        "device": device_name(target.device),
        "threads": given.threads,
        "versions": versions(),
        "git": git_commit(),
        "max_new_tokens": count,
        "curves": curves,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "growth.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(curves, given.out / "growth.png")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
