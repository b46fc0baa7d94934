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
from specdistill_kernels.tiles import Tile, Tiles
from specdistill_kernels.verification.launch import Division

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DAY = 86_400  # seconds: a slow machine leaves nothing out


class Watch:
    """A stopwatch by which one tile is the quickest, and one does not run."""

    seconds = 0.0

    def __init__(self, quick: Tile) -> None:
        self.quick = quick

    def time(self, call: Callable[[], Tile]) -> dict[str, float]:
        tile = call()
        if tile == (2048, 16):
            raise RuntimeError("out of resources")
        return {"cold": 1.0 if tile == self.quick else 2.0}


def test_the_quickest_is_chosen_and_a_tie_leaves_what_is(tmp_path: Path) -> None:
    session = Session.begin(tmp_path / "tune.json", smoke=True, seed=1, seconds=DAY)

    def chosen(quick: Tile) -> Tiles:
        watch: Any = Watch(quick)
        return gpu_tune.best(session, watch, "sums", Tiles(), 4, lambda t: [lambda: t.sums])

    assert chosen(Tile(512, 4)) == Tiles(sums=Tile(512, 4))
    assert chosen(Tile(7, 7)) == Tiles()
    tried = json.loads(session.file.read_text())["tried"]
    assert sum("raised" in entry for entry in tried) == 2
    assert sum("microseconds" in entry for entry in tried) == len(tried) - 2


def test_it_runs_and_prints_an_entry_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tiny shapes, with two choices of each."""

    def two(now: Tile | int, most: int) -> list[Tile | int]:
        return [now, now // 2] if isinstance(now, int) else [now, Tile(now.block // 2, now.warps)]

    monkeypatch.setattr(gpu_tune, "candidates", two)
    assert gpu_tune.main(["--out", str(tmp_path), "--smoke", "--seconds", str(DAY)]) == 0
    report = json.loads((tmp_path / "tune.json").read_text())
    assert not [entry for entry in report["tried"] if "raised" in entry]
    (line,) = report["table"]
    entry = "{" + line.removeprefix("tiles.py: ") + "}"
    (tiles,) = eval(entry, {"Tiles": Tiles, "Tile": Tile}).values()
    assert isinstance(tiles, Tiles)
    assert [type(value) for value in tiles] == [type(value) for value in Tiles()]
    tried = {entry["what"].split(":")[0] for entry in report["tried"]}
    assert tried == set(Tiles._fields)


def test_a_call_is_cut_up_as_the_table_says() -> None:
    tiles = Tiles(Tile(64, 1), Tile(128, 2), Tile(256, 4), Tile(512, 8), programs=7)
    assert Division.of(tiles)[:5] == tiles[:5]


def test_each_tile_has_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session.begin(tmp_path / "tune.json", smoke=True, seed=1, seconds=DAY)
    shares: dict[str, float] = {}

    def best(session: Session, watch: Any, name: str, now: Tiles, *more: Any) -> Tiles:
        shares[name] = more[-1]
        session.add("tried", what=name)
        return now

    monkeypatch.setattr(gpu_tune, "best", best)
    gpu_tune.run(session)
    assert shares.keys() == set(Tiles._fields)
    assert list(shares.values()) == [(i + 1) / len(shares) for i in range(len(shares))]
