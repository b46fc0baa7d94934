"""Tile sizes of the kernels for this device, found by trying: under a minute, one command.

    python -m bench.gpu_tune --out DIR [--seconds 60]

Starts from the tiles in use and changes one tile after the other, each with its warps, to the pair
that takes the least time over the calls that it is a part of; times are of CUDA graphs with a cold
L2 cache. Prints the entries of the kernels' own tables, `TILES` in `verification/launch.py` and in
`divergences/triton_backend.py`, to be put there, and writes every time tried to DIR/tune.json.
`python -m specdistill_kernels.aot` then compiles what the tables may choose. No kernel has a
product of matrices, so there are no stages of loads to choose.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_session import Session, describe
from bench.gpu_timing import Stopwatch

Pair = tuple[int, int]  # entries of a tile, its warps
WARPS = (4, 8, 16)
LEAST = 2  # entries a thread


def candidates(now: Pair, most: int) -> list[Pair]:
    """Half, once and twice the tile, with as many warps as give a thread 2 to `most` entries; the
    pair in use first, so that a tie leaves it.
    """
    tiles = [now[0], now[0] // 2, now[0] * 2]
    pairs = [(t, w) for t in tiles for w in WARPS if LEAST <= t / (32 * w) <= most]
    return [now, *(pair for pair in pairs if pair != now)]


def best(
    session: Session,
    watch: Stopwatch,
    name: str,
    now: Pair,
    most: int,
    calls: Callable[[Pair], list[Any]],
) -> Pair:
    """The pair of the least total time over the calls that it makes; one that does not run, as it
    takes more than the device has, is noted and left.
    """
    times: dict[Pair, float] = {}
    for pair in candidates(now, most):
        what = f"{name}: {pair[0]} entries, {pair[1]} warps"
        if times and session.out_of_time(what):
            break
        try:
            each = [watch.time(call)["cold"] for call in calls(pair)]
        except Exception as error:  # the compiler's errors have no common base
            session.add("tried", what=what, raised=f"{type(error).__name__}: {error}"[:500])
            continue
        times[pair] = sum(each)
        session.add("tried", what=what, microseconds=each)
    return min(times, key=lambda pair: times[pair]) if times else now


def run(session: Session) -> None:
    if not session.triton:
        session.report["note"] = "no kernel to tune: this device runs none"
        return
    watch = Stopwatch(session)
    watch.seconds = 0.02
    start = time.monotonic()
    lines = [tune_losses(session, watch), tune_verification(session, watch)]
    session.report |= {"table": lines, "tuned_seconds": time.monotonic() - start}
    raised = [entry["what"] for entry in session.report["tried"] if "raised" in entry]
    session.check("tiles were tried", len(raised) < len(session.report["tried"]), raised=raised)
    for line in lines:
        print(f"  {line}", flush=True)


def device_class(device: torch.device) -> str:
    """The key of the kernels' tables."""
    if device.type != "cuda":
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tune_losses(session: Session, watch: Stopwatch) -> str:
    from specdistill_kernels.divergences import triton_backend as backend
    from specdistill_kernels.divergences.reference import Dense, Lumped, mixture
    from specdistill_kernels.divergences.targets import keep_top_k

    rows, width = (4, 64) if session.smoke else (512, 151_936)
    draft, other = (session.normal(rows, width).to(torch.bfloat16) for _ in range(2))
    labels, weights = session.integers(width, rows), torch.ones(rows, device=session.device)
    top = keep_top_k(other, 20)
    lumped = Lumped(top.tokens, top.log_probs, top.log_tail)
    forms: dict[str, list[Any]] = {
        "plain": [(Dense(other, None), None, "fkl"), (lumped, None, "fkl")],
        "sums": [(Dense(other, None), None, "jsd")],
        "tight": [(lumped, None, "tvd")],
        "tightest": [(Dense(other, None), labels, {"tvd": 0.9, "ce": 0.1})],
    }
    tiles = backend.tiles_for(session.device)
    for name, cases in forms.items():

        def calls(pair: Pair, cases: list[Any] = cases) -> list[Any]:
            tile = backend.Tile(*pair)
            return [
                partial(
                    backend.row_gradients,
                    draft,
                    target,
                    chosen,
                    weights,
                    mixture(loss),
                    1.0,
                    tile=tile,
                )
                for target, chosen, loss in cases
            ]

        found = best(session, watch, f"losses, {name}", getattr(tiles, name), 4, calls)
        tiles = tiles._replace(**{name: backend.Tile(*found)})  # type: ignore[arg-type]
    return f'divergences/triton_backend.py: "{device_class(session.device)}": {tiles},'


def tune_verification(session: Session, watch: Stopwatch) -> str:
    """Each tile that has warps of its own, over calls that filter where it is a filter's; all
    count, so that none gains at another's cost.
    """
    from specdistill_kernels import RowSettings
    from specdistill_kernels.verification import launch
    from specdistill_kernels.verification import triton_backend as backend

    num, width = (2, 64) if session.smoke else (5, 151_936)
    made = []
    for batch in (2,) if session.smoke else (1, 32):
        target = session.normal(batch, num + 1, width).to(torch.bfloat16)
        seeds = session.integers(2**62, batch)
        warm = torch.full((batch,), 0.7, device=session.device)
        rows = RowSettings(warm, seeds, torch.zeros_like(seeds))
        tokens = session.integers(width, batch, num)
        lengths = torch.full((batch,), num, device=session.device)
        for settings in (rows, rows._replace(top_p=torch.full_like(warm, 0.95))):
            made.append(
                partial(
                    backend.verify,
                    tokens,
                    target[:, :num].clone(),
                    target,
                    settings,
                    lengths=lengths,
                    draft_vocab=None,
                    draft_lse=None,
                    point_mass=None,
                    mode="token",
                    lenience=None,
                )
            )
    tiles = launch.tiles_for(session.device, 1, num, width)
    for name in launch.Tiles._fields:
        warps = f"{name}_warps"
        if warps not in launch.Tiles._fields:
            continue

        def calls(pair: Pair, name: str = name, warps: str = warps, now: Any = tiles) -> list[Any]:
            changed = now._replace(**{name: pair[0], warps: pair[1]})
            return [partial(call, tiles=changed) for call in made]

        now = getattr(tiles, name), getattr(tiles, warps)
        found = best(session, watch, f"verify, {name}", now, 32, calls)
        tiles = tiles._replace(**{name: found[0], warps: found[1]})
    return f'verification/launch.py: "{device_class(session.device)}": {tiles},'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu_tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tune.json")
    parser.add_argument("--seconds", type=float, default=60, help="begins no new trial after them")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any device")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.smoke:
        parser.error("there is no CUDA device; --smoke proves the mechanics without one")
    given.out.mkdir(parents=True, exist_ok=True)
    session = Session.begin(given.out / "tune.json", given.smoke, 0, given.seconds)
    session.report |= describe(given.smoke)
    try:
        run(session)
        session.end("passed" if session.sound else "failed")
    except Exception:
        session.end("raised", traceback=traceback.format_exc())
        raise
    return 0 if session.sound else 1


if __name__ == "__main__":
    sys.exit(main())
