"""What tells files and models apart, whatever they are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdistill.models.checkpoint_files import CONFIG, VOCAB_FILE, read_json, weight_files

if TYPE_CHECKING:
    from torch import Tensor

# What config.json says beside what is computed: who wrote it, with what, and how to keep it.
_REMARKS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "finetuned_from",
    "specdistill",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_sha256(folder: Path) -> str:
    """Hash of a checkpoint's model: its weights, what its config.json makes of them, and the ends
    of answers that its generation_config.json names. A run asks for it more than once, and weights
    that have not changed since are not read again: they may be of many gigabytes. Raises
    `ModelError` where the folder holds no whole checkpoint.
    """
    files = [*weight_files(folder), folder / VOCAB_FILE]
    digest = _joined([file for file in files if file.exists()])
    generation = folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.exists() else None
    digest.update(_canonical([read_json(folder / CONFIG), ends]))
    return digest.hexdigest()


def hashes_of(folder: Path) -> set[str]:
    """`model_sha256`, and what earlier versions wrote in its place: the hash of the weights alone,
    which cannot tell models apart that differ in their config.json.
    """
    return {model_sha256(folder), _joined(sorted(folder.glob("*.safetensors"))).hexdigest()}


def tensors_sha256(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> str:
    """Hash of a model in memory."""
    import torch

    digest = hashlib.sha256(_canonical(config))
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical(config: Any) -> bytes:
    return json.dumps(_without_remarks(config), sort_keys=True, default=str).encode()


def _without_remarks(config: Any) -> Any:
    if isinstance(config, list):
        return [_without_remarks(part) for part in config]
    if isinstance(config, dict):
        return {k: _without_remarks(v) for k, v in config.items() if k not in _REMARKS}
    return config


def _joined(files: list[Path]) -> Any:
    """Of files and their names."""
    digest = hashlib.sha256()
    for file in files:
        now = file.stat()
        digest.update(file.name.encode())
        digest.update(_sha256_of(file, now.st_ino, now.st_size, now.st_mtime_ns).encode())
    return digest


@cache
def _sha256_of(file: Path, *state: int) -> str:
    return file_sha256(file)
