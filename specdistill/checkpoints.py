"""Resumable training state as safetensors and JSON, no pickle. It is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from specdistill.errors import StorageError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path, state: dict[str, Any], weights: Mapping[str, Tensor], optimizer: Optimizer
) -> None:
    """Replace the checkpoint in `folder` by this one; the old one stays until then."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    moments = {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file(
            {name: value.detach().contiguous() for name, value in weights.items()}, new / WEIGHTS
        )
        save_file(moments, new / OPTIMIZER)
        (new / STATE).write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write a checkpoint to {folder}: {getattr(error, 'strerror', None) or error}; "
            "free space and resume"
        ) from error


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder`, or the one before it where `save_checkpoint` was killed just as
    it exchanged the two."""
    candidates = (folder, folder.with_name(folder.name + ".old"))
    return next((found for found in candidates if (found / STATE).exists()), None)


def load_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Any]:
    """Read a checkpoint into `weights` and `optimizer`; returns its state. Raises `StorageError`
    where it does not fit.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        saved = load_file(folder / WEIGHTS)
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in weights.items()}:
            raise ValueError("its weights have other names or shapes than the draft's")
        for name, value in saved.items():
            weights[name].data.copy_(value)
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / OPTIMIZER).items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(
            {"state": entries, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(
            f"the checkpoint in {folder} cannot be used: {error}; remove it to start over"
        ) from error
    return state
