"""A checkpoint is the last one that is whole, with the best weights beside the last."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdistill.training.checkpoints import (
    RunState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def save(folder: Path, step: int) -> None:
    """The last weights say the step, the best ones its negative."""
    last, best = ({"w": torch.full((2,), float(value))} for value in (step, -step))
    state = RunState(step, 7 * step, 1.0, {"kept_step": step}, {})
    save_checkpoint(folder, state, last, best, {"0.m": torch.full((2,), step + 0.5)})


def load(folder: Path) -> tuple[int, float, float, float]:
    """The step, and what it says in the last weights, the best and the moments."""
    last, best = {"w": torch.zeros(2)}, {"w": torch.zeros(2)}
    moments: dict[str, Tensor] = {}
    found = find_checkpoint(folder)
    assert found is not None
    state = load_checkpoint(found, last, best, moments.update)
    return state.step, last["w"][0].item(), best["w"][0].item(), moments["0.m"][0].item()


def test_the_best_weights_are_not_the_last(tmp_path: Path) -> None:
    for step in (4, 8):
        save(tmp_path / "checkpoints", step)
        assert load(tmp_path / "checkpoints") == (step, step, -step, step + 0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoints"]


def test_the_newer_of_two_is_taken(tmp_path: Path) -> None:
    """As after a kill between the exchange of the two and the end of the older one."""
    save(tmp_path / "checkpoints", 4)
    (tmp_path / "checkpoints").rename(tmp_path / "checkpoints.old")
    assert load(tmp_path / "checkpoints")[0] == 4
    save(tmp_path / "other", 8)
    (tmp_path / "other").rename(tmp_path / "checkpoints")
    assert load(tmp_path / "checkpoints")[0] == 8
    save(tmp_path / "checkpoints", 12)
    assert not (tmp_path / "checkpoints.old").exists()


def test_the_old_one_is_there_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever change of a file is the last before the process dies."""
    folder = tmp_path / "checkpoints"
    save(folder, 4)

    class Killed(BaseException):
        pass

    deaths = 0
    for allowed in range(100):
        left = allowed

        def dying(change: Any) -> Any:
            def work(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return change(*args, **kwargs)

            return work

        with monkeypatch.context() as patched:
            for place in ("pathlib.Path.rename", "pathlib.Path.replace", "shutil.rmtree"):
                module, _, name = place.rpartition(".")
                owner = Path if module == "pathlib.Path" else __import__("shutil")
                patched.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(folder, 8)
            except Killed:
                deaths += 1
        assert load(folder)[0] in (4, 8)
        if left:
            break
        if load(folder)[0] == 8:
            save(folder, 4)
    assert deaths >= 2
    assert load(folder)[0] == 8
