"""How the kernels' work is cut up for this device, found by trying: under a minute, one command.

    python -m bench.gpu_tune --out DIR [--seconds 60]

Starts from the tiles in use and changes one tile after the other, each with its warps, and how many
programs count for filters, to what takes the least time over the calls that it is a part of; times
are of CUDA graphs with a cold L2 cache. Prints this device's entry of `TILES` in
`specdistill_kernels/tiles.py`, to be put there, and writes every time tried to DIR/tune.json.
`python -m specdistill_kernels.aot` then compiles what the table may choose. No kernel multiplies
matrices, so there are no stages of loads to choose.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_session import Session, describe
from bench.gpu_timing import Stopwatch
from specdistill_kernels.tiles import Tile, Tiles, device_class, tiles_for

Calls = Callable[[Tiles], list[Any]]  # those that a tile is a part of
WARPS = (4, 8, 16)
LEAST = 2  # entries a thread
MOST_OF_LOSSES, MOST = 4, 32  # entries a thread: the losses hold several numbers of each


def candidates(now: Tile | int, most: int) -> Sequence[Tile | int]:
    """Half, once and twice the tile, with as many warps as give a thread 2 to `most` entries, or
    the number of programs; the one in use first, so that a tie leaves it.
    """
    if isinstance(now, int):
        return [now, now // 2, now * 2]
    blocks = [now.block, now.block // 2, now.block * 2]
    tiles = [Tile(b, w) for b in blocks for w in WARPS if LEAST <= b / (32 * w) <= most]
    return [now, *(tile for tile in tiles if tile != now)]


def words_of(choice: Tile | int) -> str:
    if isinstance(choice, int):
        return str(choice)
    return f"{choice.block} entries, {choice.warps} warps"


def best(
    session: Session,
    watch: Stopwatch,
    name: str,
    now: Tiles,
    most: int,
    calls: Calls,
    share: float = 1.0,
) -> Tiles:
    """With the candidate of the least total time over the calls that it is a part of; one that does
    not run, as it takes more than the device has, is noted and left. None is begun beyond `share`
    of the session's time.
    """
    times: dict[Tiles, float] = {}
    for choice in candidates(getattr(now, name), most):
        tiles = now._replace(**{name: choice})  # type: ignore[arg-type]
        what = f"{name}: {words_of(choice)}"
        if times and session.out_of_time(what, share):
            break
        try:
            each = [watch.time(call)["cold"] for call in calls(tiles)]
        except Exception as error:  # the compiler's errors have no common base
            session.add("tried", what=what, raised=f"{type(error).__name__}: {error}"[:500])
            continue
        times[tiles] = sum(each)
        session.add("tried", what=what, microseconds=each)
    return min(times, key=lambda tiles: times[tiles]) if times else now


def run(session: Session) -> None:
    if not session.triton:
        session.report["note"] = "no kernel to tune: this device runs none"
        return
    watch = Stopwatch(session)
    watch.seconds = 0.02
    start = time.monotonic()
    tiles = tiles_for(session.device)
    made = [(*item, MOST_OF_LOSSES) for item in loss_calls(session).items()]
    made += [(*item, MOST) for item in verify_calls(session).items()]
    for i, (name, calls, most) in enumerate(made):  # compiling takes the most time: each its share
        tiles = best(session, watch, name, tiles, most, calls, (i + 1) / len(made))
    line = f'tiles.py: "{device_class(session.device)}": {tiles},'
    session.report |= {"table": [line], "tuned_seconds": time.monotonic() - start}
    raised = [entry["what"] for entry in session.report["tried"] if "raised" in entry]
    session.check("tiles were tried", len(raised) < len(session.report["tried"]), raised=raised)
    print(f"  {line}", flush=True)


def loss_calls(session: Session) -> dict[str, Calls]:
    """Of each form of the losses' kernel, by the name of its tile."""
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

    def run(tiles: Tiles, name: str, target: Any, chosen: Any, loss: Any) -> Any:
        parts, tile = mixture(loss), getattr(tiles, name)
        return backend.row_gradients(draft, target, chosen, weights, parts, 1.0, tile=tile)

    def calls(name: str) -> Calls:
        return lambda tiles: [partial(run, tiles, name, *case) for case in forms[name]]

    return {name: calls(name) for name in forms}


def verify_calls(session: Session) -> dict[str, Calls]:
    """Of verification, with and without a filter: all count, so that no tile gains at another's
    cost.
    """
    from specdistill_kernels import RowSettings
    from specdistill_kernels.verification import triton_backend as backend
    from specdistill_kernels.verification.launch import division_for

    names = ("stats", "race", "tally", "cut", "programs")
    num, width = (2, 64) if session.smoke else (5, 151_936)
    made = []
    for batch in (2,) if session.smoke else (1, 32):
        target = session.normal(batch, num + 1, width).to(torch.bfloat16)
        seeds = session.integers(2**62, batch)
        warm = torch.full((batch,), 0.7, device=session.device)
        rows = RowSettings(warm, seeds, torch.zeros_like(seeds))
        tokens = session.integers(width, batch, num)
        lengths = torch.full((batch,), num, device=session.device)
        absent = dict.fromkeys(("draft_vocab", "draft_lse", "point_mass", "lenience"))
        for settings in (rows, rows._replace(top_p=torch.full_like(warm, 0.95))):
            draft = target[:, :num].clone()
            given = (tokens, draft, target, settings)
            made.append(partial(backend.verify, *given, lengths=lengths, mode="token", **absent))

    usual = division_for(session.device, 1, num, width)

    def calls(tiles: Tiles) -> list[Any]:
        division = usual._replace(**{name: getattr(tiles, name) for name in names})
        return [partial(call, division=division) for call in made]

    return dict.fromkeys(names, calls)


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
