"""Parallel drafts against autoregressive ones on the demo pair, at equal training time.

    python -m bench.parallel --out DIR [--seconds 60] [--only "2 layers,parallel 2 layers"]

One set of answers; every arm trains a draft for the same seconds and scores it on the same held-out
prompts. DIR/parallel.json has an entry an arm, so an interrupted measurement goes on where it
stopped; parallel.md has its tables: what was measured, and what the same τ would give where a
pass of the draft costs another share c of the target's. Arms of one machine in one call can be
compared, no others.
"""

import argparse
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import yaml

from bench.methods import append, begun, specdistill
from specdistill.run_folder import read_metrics
from specdistill.scoring.scorecard import Scorecard

LONGEST, HELDOUT = 48, 16
COSTS = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class Arm:
    """A draft of the target's first `layers`, or what the arm `start` made. `share` of the seconds
    are trained; `training` overrides keys of the run.
    """

    name: str
    layers: int = 2
    parallel: bool = True
    start: str | None = None
    share: float = 1.0
    gammas: str = "6"
    training: tuple[str, ...] = ()
    score: tuple[str, ...] = ()


GAMMAS = "4,6,8"
ONE_BY_ONE = ("--drafting", "autoregressive")
ORDINARY_FIRST = ("parallel.ordinary=0.5", "parallel.num_draft_tokens=5")
UNIFORM = ("parallel.weighting=uniform",)
ARMS = (
    Arm("2 layers", parallel=False, gammas=f"3,{GAMMAS}"),
    Arm("parallel 2 layers", gammas=GAMMAS),
    Arm("2 layers, half the time", parallel=False, share=0.5),
    Arm(
        "parallel 2 layers, the other half",
        start="2 layers, half the time",
        share=0.5,
        gammas=GAMMAS,
    ),
    Arm("parallel 2 layers, one by one", start="parallel 2 layers", share=0, score=ONE_BY_ONE),
    Arm("parallel 2 layers, ordinary first", gammas="3,5", training=ORDINARY_FIRST),
    Arm("parallel 2 layers, uniform", training=UNIFORM),
    Arm("parallel 2 layers, e2e_tv", training=("loss=e2e_tv", *UNIFORM)),
    Arm("parallel 2 layers, lk_hybrid", training=("loss=lk_hybrid",)),
    Arm("parallel 2 layers, fkl alone", training=("loss=fkl",)),
    Arm("parallel 4 layers", 4, gammas=GAMMAS),
    Arm("4 layers", 4, parallel=False, gammas=f"3,{GAMMAS}"),
    Arm("parallel 6 layers", 6, gammas=GAMMAS),
)


@dataclass
class Measured:
    """A row of an arm's card. `by_place` is the acceptance of each place of a proposal given that
    all before it were accepted; `cost_ratio` is the time of a pass of the draft over that of a
    plain step of the target; `steps` were trained.
    """

    arm: str
    passes: int | None  # of the draft in a round; None: one for each token
    temperature: float
    num_draft_tokens: int
    alpha: float
    by_place: list[float]
    block_efficiency: float
    cost_ratio: float
    speedup: float
    speedup_ci95: tuple[float, float]
    steps: int


def answers(out: Path, target: str, threads: int, prompts: int) -> Path:
    data = out / "data"
    specdistill(
        *("generate", "--target", target, "--prompts", "demo:train", "--limit", prompts),
        *("--max-new-tokens", 64, "--threads", threads, "--out", data),
    )
    return data


def start_of(arm: Arm, out: Path, target: str) -> Path:
    """The folder of the draft that the arm starts from."""
    if arm.start is not None:
        return _folder(out, arm.start) / "run" / "draft"
    draft = out / f"{arm.layers} layers from the target"
    if not draft.exists():
        specdistill(
            *("init", "--target", target, "--layers", arm.layers, "--vocab-size", 3072),
            *("--vocab-from", out / "data", "--out", draft),
        )
    return draft


def measure(arm: Arm, out: Path, target: str, seconds: float, threads: int) -> list[Measured]:
    folder = _folder(out, arm.name)
    folder.mkdir(parents=True, exist_ok=True)
    draft, steps = start_of(arm, out, target), 0
    if arm.share:
        run = folder / "run"
        config: dict[str, Any] = {
            "target": target,
            "draft": str(draft),
            "data": str(out / "data"),
            "run_dir": str(run),
            "decode": None,
            "evaluate_every": 10**6,
            "heldout": 8,
            "training": {
                "max_seconds": arm.share * seconds,
                "learning_rate": 1e-3,
                "batch_tokens": 768,
            },
        }
        config |= {"parallel": {}} if arm.parallel else {}
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        specdistill("distill", file, "--resume", "--threads", threads, *arm.training)
        draft = run / "draft"
        steps = max(row["step"] for row in read_metrics(run / "metrics.jsonl"))
    card = folder / "scorecard.json"
    specdistill(
        *("score", "--target", target, "--draft", draft, "--prompts", "demo:heldout"),
        *("--limit", HELDOUT, "--num-draft-tokens", arm.gammas, "--temperature", "0,1"),
        *("--max-new-tokens", LONGEST, "--threads", threads, "--overwrite", "--out", card),
        *arm.score,
    )
    return [
        Measured(
            arm.name,
            1 if arm.parallel and not arm.score else None,
            row.temperature,
            row.num_draft_tokens,
            row.acceptance_rate,
            row.acceptance_by_position,
            row.block_efficiency,
            row.cost_ratio,
            row.speedup,
            row.speedup_ci95,
            steps,
        )
        for row in Scorecard.read(card).rows
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, a line a row; the acceptance by place at an arm's largest γ."""
    lines = ["| arm | T | γ | α | τ | c | speedup | steps |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        low, high = r["speedup_ci95"]
        lines.append(
            f"| {r['arm']} | {r['temperature']:g} | {r['num_draft_tokens']} | {r['alpha']:.3f} | "
            f"{r['block_efficiency']:.2f} | {r['cost_ratio']:.3f} | {r['speedup']:.2f} "
            f"[{low:.2f}, {high:.2f}] | {r['steps']} |"
        )
    lines += ["", "| arm | T | γ | acceptance by place |", "|---|---|---|---|"]
    lines += [
        f"| {r['arm']} | {r['temperature']:g} | {r['num_draft_tokens']} | "
        f"{' '.join(f'{a:.2f}' for a in r['by_place'])} |"
        for r in _widest(rows)
    ]
    return "\n".join(lines) + "\n"


def at_costs(rows: list[dict[str, Any]]) -> str:
    """Markdown: the best speedup over γ that the measured acceptance by place gives where a pass of
    the draft costs c target steps and a verify pass one: τ(γ) / (1 + c · passes).
    """
    lines = ["| arm | T | " + " | ".join(f"c = {c:g}" for c in COSTS) + " |"]
    lines.append("|---|---|" + "---|" * len(COSTS))
    for r in _widest(rows):
        survival = list(accumulate(r["by_place"], mul))
        cells = []
        for c in COSTS:
            speeds = {
                gamma: (1 + sum(survival[:gamma])) / (1 + c * (r["passes"] or gamma))
                for gamma in range(1, len(survival) + 1)
            }
            best = max(speeds, key=lambda gamma: speeds[gamma])
            cells.append(f"{speeds[best]:.2f} (γ = {best})")
        lines.append(f"| {r['arm']} | {r['temperature']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _widest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the largest γ of each arm and temperature."""
    by_gamma = sorted(rows, key=lambda r: int(r["num_draft_tokens"]))
    widest = {(r["arm"], r["temperature"]): r for r in by_gamma}
    return [widest[key] for key in dict.fromkeys((r["arm"], r["temperature"]) for r in rows)]


def _folder(out: Path, arm: str) -> Path:
    return out / arm.replace(" ", "-").replace(",", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--prompts", type=int, default=96, help="prompts answered")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="arms by name, separated by semicolons")
    options = parser.parse_args()
    wanted = options.only.split(";") if options.only else [arm.name for arm in ARMS]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "parallel.json"
    document = begun(file, options.seconds, options.threads)
    done = {row["arm"] for row in document["rows"]}
    answers(options.out, options.target, options.threads, options.prompts)
    for arm in ARMS:
        if arm.name in done or arm.name not in wanted:
            continue
        rows = measure(arm, options.out, options.target, options.seconds, options.threads)
        append(file, document, rows, lambda all_: f"{table(all_)}\n{at_costs(all_)}")
    print(file.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
