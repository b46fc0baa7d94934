"""Resumable training state as safetensors and JSON, no pickle. It is there whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdistill.documents import read_json
from specdistill.errors import StorageError
from specdistill.files import replacing, writing

WEIGHTS, BEST, OPTIMIZER = "weights.safetensors", "best.safetensors", "optimizer.safetensors"
STATE = "state.json"

Weights = Mapping[str, Tensor]


def _of_a_step(best: dict[str, Any]) -> dict[str, Any]:
    numbers = (v for v in best.values() if not isinstance(v, list))
    if type(best.get("kept_step")) is not int or not all(
        isinstance(v, int | float) and math.isfinite(v) for v in numbers
    ):
        raise ValueError("it must hold numbers by name, among them kept_step")
    return best


@dataclass
class RunState:
    """state.json: how far a run has come; seconds are those of its updates, best is the row of its
    best evaluation so far, empty before the first. origins: hashes of what it started from, by the
    key of the configuration that names it. masks_since: the step at which those of a parallel draft
    began.
    """

    step: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    best: Annotated[dict[str, Any], AfterValidator(_of_a_step)]
    origins: dict[str, str]
    config_sha256: str | None = None
    masks_since: Annotated[int, Field(ge=0)] | None = None
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore", allow_inf_nan=False)


def save_checkpoint(
    folder: Path, state: RunState, weights: Weights, best: Weights, moments: Weights
) -> None:
    """Replace the checkpoint in `folder` by this one; the old one stays until then. `best` are the
    weights of the best evaluation so far, `moments` what the optimiser keeps.
    """
    old = folder.with_name(folder.name + ".old")
    with writing(f"a checkpoint to {folder}", "free space and resume"):
        with replacing(folder) as new:
            new.mkdir()
            for tensors, name in ((weights, WEIGHTS), (best, BEST), (moments, OPTIMIZER)):
                save_file({n: t.detach().contiguous() for n, t in tensors.items()}, new / name)
            (new / STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
            if folder.exists():  # else the old one is all there is
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder`, or the one before it where `save_checkpoint` was killed just as
    it exchanged the two."""
    candidates = (folder, folder.with_name(folder.name + ".old"))
    return next((candidate for candidate in candidates if (candidate / STATE).exists()), None)


def copy_weights(source: Weights, into: Weights) -> None:
    """Values by name, in place."""
    for name, value in into.items():
        value.data.copy_(source[name])


def load_checkpoint(
    folder: Path,
    weights: Weights,
    best: Weights,
    restore: Callable[[dict[str, Tensor]], None],
) -> RunState:
    """Read a checkpoint into `weights` and `best`, and `restore` the moments; returns its state.
    Raises `StorageError` where it does not fit.
    """
    state = read_json(folder / STATE, RunState, f"remove {folder} to start over")
    try:
        for tensors, file in ((weights, WEIGHTS), (best, BEST)):
            saved = load_file(folder / file)
            if _kinds(saved) != _kinds(tensors):
                raise ValueError(f"{file} has other names, shapes or types than what is trained")
            copy_weights(saved, tensors)
        restore(load_file(folder / OPTIMIZER))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint in {folder} cannot be used: {error}; remove it to start over"
        ) from error
    return state


def _kinds(tensors: Weights) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
