"""What tells files apart, whatever they are called."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """Hash of a checkpoint's weight files, in order of their names. A run asks for it more than
    once, and a file that has not changed since is not read again: it may be of many gigabytes.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        now = file.stat()
        digest.update(file.name.encode())
        digest.update(_sha256_of(file, now.st_ino, now.st_size, now.st_mtime_ns).encode())
    return digest.hexdigest()


@cache
def _sha256_of(file: Path, *state: int) -> str:
    return file_sha256(file)
