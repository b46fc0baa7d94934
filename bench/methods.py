"""What each method adds on the demo pair, against its absence at equal training time.

    python -m bench.methods --out DIR [--seconds 60] [--only hints,lora] [--target T]

Every arm is the whole loop by the command line: answers, a draft, distillation for the same
seconds, a score on the same held-out prompts. DIR/methods.json has the rows after every arm, so an
interrupted measurement goes on where it stopped; methods.md is their table. Arms of one machine in
one call can be compared, no others.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.decoding import (
    CombinedDrafter,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.models import choose_device, load
from specdistill.provenance import device_name, git_commit, versions
from specdistill.run_folder import read_metrics
from specdistill.scoring.scorecard import Scorecard

GAMMA, LONGEST, HELDOUT = 3, 48, 16
FEW, MANY = 24, 96  # prompts answered


@dataclass(frozen=True)
class Arm:
    """A method: `against` is the arm without it. `answers` are options of `generate` in place of
    the baseline's, `training` overrides of the run, `score` options of `score`.
    """

    name: str
    against: str = "baseline"
    prompts: int = MANY
    answers: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    widen: bool = False
    writer: str | None = None  # the arm whose draft writes the answers


LIVE = ("signal=live",)
BEST = ("--temperature", "1", "--best-of", "4", "--scorer", "log-probability")
ARMS = (
    Arm("baseline"),
    Arm("live signal", training=LIVE),
    Arm("hints", "live signal", training=(*LIVE, "hints={kind: mse, weight: 1.0}")),
    Arm("lora", training=("training.lora={rank: 32}",)),
    Arm("e2e_tv", training=("loss=e2e_tv", f"num_draft_tokens={GAMMA}")),
    Arm("fkl + e2e_tv", training=("loss={fkl: 1, e2e_tv: 1}", f"num_draft_tokens={GAMMA}")),
    Arm("induced", "live signal", training=("policy=induced",)),
    Arm("lenience", score=("--lenience", "lin:0.5")),
    # Of four answers one is kept, so a quarter of the prompts takes as long.
    Arm(
        "best of 4",
        prompts=MANY // 4,
        answers=BEST,
    ),
    Arm("sampled once", prompts=MANY, answers=("--temperature", "1")),
    Arm(
        "best of the draft's at equal compute",
        "best of 4",
        prompts=MANY // 4,
        writer="baseline",
        answers=(*BEST, "--match", "compute"),
    ),
    Arm("few prompts", prompts=FEW),
    Arm("widened prompts", "few prompts", prompts=FEW, widen=True),
    Arm("chain of thought", answers=("--style", "chain-of-thought")),
)


@dataclass
class Measured:
    """One arm at one temperature. Seconds are wall-clock, of answers (widening included), training
    and score; `steps` were trained.
    """

    arm: str
    against: str
    temperature: float
    alpha: float
    block_efficiency: float
    speedup: float
    speedup_ci95: tuple[float, float]
    steps: int
    answer_seconds: float
    train_seconds: float


def specdistill(*arguments: object) -> float:
    """Run a command; the seconds it took. Its errors end the measurement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "specdistill", *map(str, arguments)], check=True)
    return time.perf_counter() - start


def begun(file: Path, seconds: float, threads: int) -> dict[str, Any]:
    """The measurement in a file, if one was interrupted there, with the facts of this call."""
    document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    device = device_name(torch.device(choose_device("auto")))
    facts = {"git": git_commit(), "device": device, "versions": versions()}
    return document | {"seconds": seconds, "threads": threads} | facts


def append(
    file: Path,
    document: dict[str, Any],
    rows: Sequence[Any],
    text: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Add rows, dataclasses, to a measurement and write it, with what `text` makes of all its rows
    in Markdown beside it.
    """
    document["rows"] += json.loads(json.dumps([asdict(row) for row in rows]))
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(text(document["rows"]), encoding="utf-8")


def measure(arm: Arm, out: Path, target: str, seconds: float, threads: int) -> list[Measured]:
    """The whole loop of an arm, in its folder below `out`."""
    folder = out / arm.name.replace(" ", "-")
    common = ("--target", target, "--threads", threads)
    answering = 0.0
    shared = out / "baseline" / "data"
    if arm.prompts == MANY and not arm.answers and arm.name != "baseline":
        data = shared
    else:
        data, prompts = folder / "data", "demo:train"
        options = ["--max-new-tokens", 64, "--limit", arm.prompts]
        if arm.widen:
            prompts = folder / "wide.jsonl"
            options[-1] = MANY
            answering += specdistill(
                "widen",
                *common,
                "--prompts",
                "demo:train",
                "--limit",
                arm.prompts,
                "--count",
                MANY - arm.prompts,
                "--out",
                prompts,
            )
        if arm.writer is not None:  # at full vocabulary, or it could not write all that it wants
            writer = folder / "writer"
            draft = out / arm.writer / "run" / "draft"
            if not writer.exists():
                specdistill("export", "--draft", draft, "--for", "transformers", "--out", writer)
            options += ["--generator", writer]
        answering += specdistill(
            "generate", *common, "--prompts", prompts, "--out", data, *options, *arm.answers
        )
    draft = out / "baseline" / "draft0"
    if not draft.exists():
        specdistill(
            "init",
            "--target",
            target,
            "--layers",
            2,
            "--vocab-size",
            3072,
            "--vocab-from",
            shared,
            "--out",
            draft,
        )
    run = folder / "run"
    trained = 0.0
    if arm.score:
        run = out / "baseline" / "run"
    else:
        config = {
            "target": target,
            "draft": str(draft),
            "data": str(data),
            "run_dir": str(run),
            "decode": None,
            "evaluate_every": 10**6,
            "heldout": 8,
            "training": {"max_seconds": seconds, "learning_rate": 1e-3, "batch_tokens": 2048},
        }
        file = folder / "run.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        trained = specdistill("distill", file, "--resume", "--threads", threads, *arm.training)
    card = folder / "scorecard.json"
    specdistill(
        "score",
        *common,
        "--draft",
        run / "draft",
        "--prompts",
        "demo:heldout",
        "--limit",
        HELDOUT,
        "--num-draft-tokens",
        GAMMA,
        "--temperature",
        "1" if arm.score else "0,1",
        "--max-new-tokens",
        LONGEST,
        "--overwrite",
        "--out",
        card,
        *arm.score,
    )
    steps = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    return [
        Measured(
            arm.name,
            arm.against,
            row.temperature,
            row.acceptance_rate,
            row.block_efficiency,
            row.speedup,
            row.speedup_ci95,
            steps,
            answering,
            trained,
        )
        for row in Scorecard.read(card).rows
    ]


def look_ups(target: str, draft: Path, threads: int) -> list[Measured]:
    """Drafters without training: prompt look-up alone, and with the draft where nothing matches;
    plain decoding and the draft alone take turns with them.
    """
    torch.set_num_threads(threads)
    big, small = load(target), load(str(draft), dtype="float32")
    prompts = [encode_prompt(big.tokenizer, p) for p in load_prompts("demo:heldout", limit=HELDOUT)]
    drafters: dict[str, Drafter | None] = {
        "plain": None,
        "the draft": ModelDrafter(small, big.vocab_size),
        "n-gram": NgramDrafter(),
        "n-gram and draft": CombinedDrafter(NgramDrafter(), ModelDrafter(small, big.vocab_size)),
    }
    decoders = {
        name: SpeculativeDecoder(
            big, drafter, **({} if drafter is None else {"num_draft_tokens": GAMMA})
        )
        for name, drafter in drafters.items()
    }
    rows = []
    for temperature in (0.0, 1.0):
        sums = {name: [0, 0, 0.0] for name in drafters}  # tokens, rounds, seconds
        for i, tokens in enumerate(prompts):
            for name, decoder in decoders.items():
                start = time.perf_counter()
                run = decoder.run([Request(str(i), tokens, LONGEST, Sampling(temperature), seed=i)])
                sums[name][2] += time.perf_counter() - start
                sums[name][0] += len(run.outputs[0].tokens)
                sums[name][1] += run.rounds
        rate = {name: count / seconds for name, (count, _, seconds) in sums.items()}
        for name, (count, rounds, _) in sums.items():
            ratio = rate[name] / rate["plain"]
            rows.append(
                Measured(
                    name,
                    "plain",
                    temperature,
                    float("nan"),
                    count / rounds,
                    ratio,
                    (float("nan"), float("nan")),
                    0,
                    0.0,
                    0.0,
                )
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an arm and temperature."""
    lines = [
        "| arm | against | T | α | τ | speedup | steps | s answering | s training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["speedup_ci95"]
        interval = "" if low != low else f" [{low:.2f}, {high:.2f}]"
        alpha = "–" if r["alpha"] != r["alpha"] else f"{r['alpha']:.3f}"
        lines.append(
            f"| {r['arm']} | {r['against']} | {r['temperature']:g} | {alpha} | "
            f"{r['block_efficiency']:.2f} | {r['speedup']:.2f}{interval} | {r['steps']} | "
            f"{r['answer_seconds']:.0f} | {r['train_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="arms by name, with commas; the baseline runs always")
    options = parser.parse_args()
    wanted = set(options.only.split(",")) if options.only else {a.name for a in ARMS} | {"n-gram"}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "methods.json"
    document = begun(file, options.seconds, options.threads)
    done = {row["arm"] for row in document["rows"]}
    for arm in ARMS:
        if arm.name not in done and (arm.name in wanted or arm.name == "baseline"):
            rows = measure(arm, options.out, options.target, options.seconds, options.threads)
            append(file, document, rows, table)
    if "n-gram" in wanted and "n-gram" not in done:
        draft = options.out / "baseline" / "run" / "draft"
        append(file, document, look_ups(options.target, draft, options.threads), table)
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
