"""Where a model's files lie: a local folder, a `.gguf` file, the demo, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from specdistill.demo import DEMO
from specdistill.errors import ModelError, model_errors
from specdistill.models.checkpoint_files import (
    INDEX,
    VOCAB_FILE,
    WEIGHTS,
    check_folder,
    indexed_files,
)
from specdistill.models.gguf_files import DEMO_SHA256, convert, demo_file


def locate(name: str) -> Path:
    """The local folder of safetensors for a model's name; converts GGUF and asks the hub where
    needed.
    """
    if name == DEMO:
        return convert(demo_file(), DEMO_SHA256)
    if name.startswith("demo:"):
        raise ModelError(f"there is no model {name!r}; the embedded one is {DEMO!r}")
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return convert(path)
    if path.is_dir():
        check_folder(name, path)
        return path
    if path.exists() or name.startswith((".", "/", "~")) or _is_local(path):
        raise ModelError(
            f"there is no checkpoint at {name}; give a folder, a .gguf file, a hub id or {DEMO!r}"
        )
    return _download(name)


def _is_local(path: Path) -> bool:
    """Whether a name that is no folder can mean nothing else: its first part is one, or it has more
    parts than a hub id.
    """
    return len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


def _download(name: str) -> Path:
    """The files of a model from the hub that are read here: no code, and no second copy of the
    weights in another format.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))

    unknown = f"{name!r} is neither a local folder nor a model the hub would give; it said"
    with model_errors(unknown):  # or gated, or the hub is out of reach
        folder = fetch("*.json", "*.model", "*.txt", "*.jinja", VOCAB_FILE)
        check_folder(name, folder)
        index = folder / INDEX
        return fetch(*(indexed_files(index) if index.exists() else [WEIGHTS]))
