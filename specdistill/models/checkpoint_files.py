"""Which files of a checkpoint's folder are the model: loading, hashing, reading the head alone and
downloading all ask here. Other files may lie beside them, and say nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdistill.errors import ModelError

CONFIG, WEIGHTS, ADAPTER = "config.json", "model.safetensors", "adapter_config.json"
SUFFIX = ".safetensors"
INDEX = WEIGHTS + ".index.json"
VOCAB_FILE = "draft_vocab.safetensors"  # of a draft whose output vocabulary is trimmed


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is no checkpoint, or one with an adapter, which is another model than
    its weights. Raises `ModelError`.
    """
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{name} holds an adapter ({ADAPTER}), which is not read here: merge it into its base "
            "(peft's merge_and_unload, then save_pretrained into a folder of its own) and name "
            "that folder"
        )
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{name} is a folder without {CONFIG}: not a Hugging Face checkpoint")


def read_json(file: Path) -> dict[str, Any]:
    """Raises `ModelError` for what is no JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(file.parent, f"its {file.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise _refusal(file.parent, f"its {file.name} is no JSON object: {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files Transformers reads the weights from, in its order: the one file, or else those that
    the index names. Raises `ModelError` where they are not all there.
    """
    if "transformers_weights" in read_json(folder / CONFIG):
        raise _refusal(
            folder,
            f"its {CONFIG} names weights of its own (transformers_weights), which is not "
            f"understood here; save them as {WEIGHTS}",
        )
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = indexed_files(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _refusal(
                folder, f"its {INDEX} names {missing[0]}, which is not there; copy it again"
            )
        return [folder / name for name in names]
    others = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]
    if others:
        raise _refusal(
            folder,
            f"it holds {min(others)} and no {WEIGHTS}: pickled weights are not read; convert them "
            "(load the model with Transformers and save_pretrained it into a new folder)",
        )
    strays = sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    beside = f"; {strays[0]} is not read without an index" if strays else ""
    raise _refusal(folder, f"it holds neither {WEIGHTS} nor {INDEX}{beside}")


def indexed_files(index: Path) -> list[str]:
    """The names of an index's files, sorted. Raises `ModelError` for an index that is damaged, or
    names anything but files beside it.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise _refusal(index.parent, f"its {index.name} is damaged: it has no weight_map")
    for name in named.values():
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(SUFFIX)):
            raise _refusal(
                index.parent,
                f"its {index.name} names {name!r}, which is no {SUFFIX} file beside it",
            )
    return sorted(set(named.values()))


def _refusal(folder: Path, reason: str) -> ModelError:
    return ModelError(f"cannot load {folder}: {reason}")
