"""One command for the day a GPU is at hand: kernels checked, timed and used, in about 4 minutes.

    python -m bench.gpu_suite --out DIR            on a CUDA device, from the root of a checkout
    python -m bench.gpu_suite --out DIR --smoke    tiny shapes on any device: proves the mechanics

Needs this checkout, torch, triton and transformers; nothing is installed. Each section runs in a
process of its own, so that a kernel that crashes or hangs takes no other section with it, and
writes DIR/SECTION.json after each figure. DIR/suite.json gathers them all; a short table comes
last. Exits 1 if a check failed or a section did not end well.
"""

import argparse
import importlib
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

if importlib.util.find_spec("specdistill_kernels") is None:  # a checkout, not installed
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch

from bench import vllm_sources
from bench.gpu_session import Session, describe, write
from bench.gpu_table import table

# Sections in the order of their worth, and their shares of the time.
SHARES = {
    "engine": 0.30,
    "check": 0.15,
    "train": 0.12,
    "tune": 0.17,
    "verify": 0.14,
    "losses": 0.07,
    "decode": 0.05,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--sections", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument(
        "--seconds",
        type=float,
        default=240,
        help="for all sections together; each begins no new case once its share is spent",
    )
    parser.add_argument("--seed", type=int, help="of every random input; fresh by default")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    parser.add_argument(
        "--vllm",
        type=Path,
        help="folder of vLLM's sources, or of its unpacked wheel, where it is not installed",
    )
    parser.add_argument("--here", action="store_true", help="run one section in this process")
    given = parser.parse_args(arguments)
    if given.here and len(given.sections) != 1:
        parser.error("--here runs one section; name it with --sections")
    if not torch.cuda.is_available() and not given.smoke:
        parser.error("there is no CUDA device; --smoke proves the mechanics without one")
    if given.vllm is not None:
        os.environ[vllm_sources.VARIABLE] = str(given.vllm.resolve())  # sections inherit it
    if given.seed is None:
        given.seed = secrets.randbits(32)
    return given


def run_here(given: argparse.Namespace) -> int:
    """One section in this process; its file says how it went."""
    (name,) = given.sections
    session = Session.begin(given.out / f"{name}.json", given.smoke, given.seed, given.seconds)
    try:
        importlib.import_module(f"bench.gpu_{name}").run(session)
        session.end("passed" if session.sound else "failed")
    except Exception:
        session.end("raised", traceback=traceback.format_exc())
        traceback.print_exc()
    return 0 if session.report["status"] == "passed" else 1


def run_apart(name: str, given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One section in a process of its own, ended where it hangs; returns what it wrote."""
    file: Path = given.out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu_suite", "--here", "--sections", name]
    command += ["--out", str(given.out), "--seconds", str(seconds), "--seed", str(given.seed)]
    command += ["--smoke"] if given.smoke else []
    process = subprocess.Popen(command)
    patience = seconds * 1.25 + 20
    try:
        outcome = f"exit code {process.wait(patience)}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        outcome = f"ended after {patience:.0f} s"
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if report.get("status") in (None, "running"):
        report |= {"status": "died", "outcome": outcome}
    return report


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        return run_here(given)
    print(f"seed {given.seed}", flush=True)
    start = time.monotonic()
    document: dict[str, Any] = describe(given.smoke) | {"seed": given.seed, "sections": {}}
    for i, name in enumerate(given.sections):
        left = given.seconds - (time.monotonic() - start)
        share = SHARES[name] / sum(SHARES[later] for later in given.sections[i:])
        print(f"\n{name}: {left * share:.0f} s at most", flush=True)
        document["sections"][name] = run_apart(name, given, max(left, 1) * share)
        document["seconds"] = time.monotonic() - start
        write(given.out / "suite.json", document)
    print(table(document))
    return 0 if all(s["status"] == "passed" for s in document["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
