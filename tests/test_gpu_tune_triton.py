"""The tuner of the kernels, with times that are made up: what it chooses, and what it prints.

TRITON_INTERPRET=1 python -m pytest tests/test_gpu_tune_triton.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1, before Python starts", allow_module_level=True)

from bench import gpu_tune
from bench.gpu_session import Session
from specdistill_kernels.divergences import triton_backend as losses
from specdistill_kernels.verification import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Watch:
    """A stopwatch by which one tile and its warps are the quickest, and one does not run."""

    seconds = 0.0

    def __init__(self, session: Session, quick: tuple[int, int] = (512, 4)) -> None:
        self.quick = quick

    def time(self, call: Callable[[], tuple[int, int]]) -> dict[str, float]:
        pair = call()
        if pair == (2048, 16):
            raise RuntimeError("out of resources")
        return {"cold": 1.0 if pair == self.quick else 2.0}


def test_the_quickest_is_chosen_and_a_tie_leaves_what_is(tmp_path: Path) -> None:
    session = Session.begin(tmp_path / "tune.json", smoke=True, seed=1, seconds=600)

    def chosen(quick: tuple[int, int]) -> tuple[int, int]:
        watch: Any = Watch(session, quick)
        pairs = gpu_tune.best(session, watch, "kernel", (1024, 8), 4, lambda p: [lambda: p])
        return pairs

    assert chosen((512, 4)) == (512, 4)
    assert chosen((7, 7)) == (1024, 8)
    tried = json.loads(session.file.read_text())["tried"]
    assert sum("raised" in entry for entry in tried) == 2
    assert sum("microseconds" in entry for entry in tried) == len(tried) - 2


def test_it_runs_and_prints_entries_of_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny shapes, with two tiles of each."""
    monkeypatch.setattr(gpu_tune, "candidates", lambda now, most: [now, (now[0] // 2, now[1])])
    assert gpu_tune.main(["--out", str(tmp_path), "--smoke", "--seconds", "600"]) == 0
    report = json.loads((tmp_path / "tune.json").read_text())
    assert not [entry for entry in report["tried"] if "raised" in entry]
    of_losses, of_verification = (line.split(".py: ")[1] for line in report["table"])
    names = {"Tiles": losses.Tiles, "Tile": losses.Tile}
    assert isinstance(eval("{" + of_losses + "}", names)[""], losses.Tiles)
    assert isinstance(eval("{" + of_verification + "}", {"Tiles": launch.Tiles})[""], launch.Tiles)
