"""Training against TRL's GKDTrainer: the same pair, answers, batches, loss (forward KL at
temperature 1) and optimiser, in turns.

    python -m bench.against_trl --trl-python V/bin/python --data DATA

DATA is a folder of `specdistill generate` with the signal kept. The draft has the target's whole
vocabulary, as TRL knows no other. Every run is a process of its own, so that its peak memory is its
own; tokens are those of the answers, timed from the end of the first step. The last line is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from specdistill import models
from specdistill.config import parse_config
from specdistill.data.token_store import Example, read_examples
from specdistill.drafts.making import make_draft, save_draft
from specdistill.models.head_only import load_head
from specdistill.provenance import device_name, git_commit, versions
from specdistill.training.batches import make_batch
from specdistill.training.distiller import Distiller

SIDES = ("TRL", "live", "kept")
WORDS = {"TRL": "TRL GKDTrainer", "live": "signal: live", "kept": "signal: kept"}


def train(job: dict[str, Any], signal: str) -> dict[str, Any]:
    """Our side: the batches of the job, by `Distiller.step`. With the kept signal the target's head
    alone is read.
    """
    torch.set_num_threads(job["threads"])
    load = models.load if signal == "live" else load_head
    target = load(job["target"], dtype="float32")
    draft = models.load(job["draft"], dtype="float32")
    config = parse_config(
        {
            **{name: job[name] for name in ("target", "draft", "data")},
            "run_dir": "unused",
            "signal": signal,
            "decode": None,
            "training": {"max_steps": 1},
        }
    )
    distiller, losses, ends = Distiller(target, draft, config), [], []
    kept = {e.id: e for e in read_examples(Path(job["data"]), signal=True)}
    for rows in job["batches"]:
        examples = [
            kept[row["id"]]
            if signal == "kept"
            else Example(row["id"], row["prompt"], row["response"])
            for row in rows
        ]
        batch = make_batch(examples, 0, draft.device)
        losses.append(distiller.step([batch], job["learning_rate"]).loss)
        ends.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ends": ends, "losses": losses, "peak_bytes": peak}


def measure(job: dict[str, Any], side: str, python: str, folder: Path) -> dict[str, float]:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    if side == "TRL":
        command = [python, str(Path(__file__).with_name("trl_worker.py")), str(file)]
    else:
        command = [sys.executable, "-m", "bench.against_trl", "--worker", side, "--job", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    timed = sum(len(row["response"]) for batch in job["batches"][1:] for row in batch)
    return {
        "tokens_per_second": timed / (found["ends"][-1] - found["ends"][0]),
        "peak_bytes": found["peak_bytes"],
        "first_loss": found["losses"][0],
        "last_loss": found["losses"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=SIDES[1:], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trl-python", help="of an environment that has TRL")
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--data", help="answers of the target, with their states")
    parser.add_argument("--layers", type=int, default=2, help="of the target, in the draft")
    parser.add_argument("--rows", type=int, default=16, help="in a batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(train(json.loads(given.job.read_text()), given.worker)))
        return
    if not given.trl_python or not given.data:
        parser.error("--trl-python and --data are needed")

    examples = read_examples(Path(given.data), signal=False)[: given.rows * given.steps]
    if len(examples) < given.rows * given.steps:
        parser.error(f"{given.data} has {len(examples)} answers; take fewer --rows or --steps")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target = models.load(given.target, dtype="float32")
        save_draft(make_draft(target, list(range(given.layers))), folder / "draft")
        rows = [
            {"id": e.id, "prompt": e.prompt_tokens, "response": e.response_tokens} for e in examples
        ]
        job = {
            "target": str(target.path),
            "draft": str(folder / "draft"),
            "data": given.data,
            "batches": [rows[i : i + given.rows] for i in range(0, len(rows), given.rows)],
            "learning_rate": 1e-3,
            "threads": given.threads,
        }
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(given.turns):
            first = turn % len(SIDES)
            for side in SIDES[first:] + SIDES[:first]:
                runs[side].append(measure(job, side, given.trl_python, folder))
    python = "import trl, transformers; print(trl.__version__, transformers.__version__)"
    theirs = subprocess.check_output([given.trl_python, "-c", python], text=True).split()
    document: dict[str, Any] = {
        "device": device_name(torch.device("cpu")),
        "threads": given.threads,
        "versions": {**versions(), "trl": theirs[0], "transformers of trl": theirs[1]},
        "git": git_commit(),
        "rows": given.rows,
        "steps": given.steps,
        "runs": runs,
    }
    for side, found in runs.items():
        speeds = [
            a["tokens_per_second"] / b["tokens_per_second"]
            for a, b in zip(found, runs["TRL"], strict=True)
        ]
        peak = max(run["peak_bytes"] for run in found)
        memory = peak / max(run["peak_bytes"] for run in runs["TRL"])
        speed = median(run["tokens_per_second"] for run in found)
        words = f"{median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f}) times TRL"
        print(f"{WORDS[side]:15} {speed:7.1f} answer tokens/s, {words}")
        words = f"{memory:.2f} of TRL's; loss {found[0]['first_loss']:.4f}"
        print(f"{'':15} peak {peak / 1e9:.2f} GB, {words} to {found[0]['last_loss']:.4f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
