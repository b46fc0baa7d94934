"""What a GGUF file says of the model and its tokenizer, and the sizes of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdistill.errors import ModelError

FACTORS = "rope_freqs.weight"  # [dims / 2] what rotary frequencies are divided by
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclass
class Contents:
    """What a file says. Raises `ModelError` where it is no whole language model."""

    file: Path

    def __post_init__(self) -> None:
        import gguf

        self._reader = gguf.GGUFReader(self.file)
        fields = self._reader.fields
        self.metadata = {key: field.contents() for key, field in fields.items() if field.types}
        self.architecture = str(self.metadata.get("general.architecture"))
        self.numbers = {t.name: math.prod(map(int, t.shape)) for t in self._reader.tensors}
        kind = self.metadata.get("general.type", "model")
        if kind != "model" or self.architecture in ("clip", "mmproj"):
            raise self.refusal(f"is no language model but {kind} {self.architecture}")
        count = int(self.metadata.get("split.count", 1))
        expected = int(self.metadata.get("split.tensors.count", len(self.numbers)))
        if count > 1 or expected != len(self.numbers):
            raise self.refusal(
                f"is one of {count} files, with {len(self.numbers)} of {expected} tensors; join "
                "them with llama-gguf-split --merge"
            )
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise self.refusal("has no vocabulary (tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens

    def refusal(self, what: str) -> ModelError:
        return ModelError(f"cannot convert {self.file.name}: it {what}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it says of the model itself, by the key below the architecture's name."""
        start = self.architecture + "."
        return {
            key.removeprefix(start): v for key, v in self.metadata.items() if key.startswith(start)
        }

    @cached_property
    def factors(self) -> Tensor | None:
        """[dims / 2] float64."""
        for tensor in self._reader.tensors:
            if tensor.name == FACTORS:
                return torch.tensor(tensor.data.reshape(-1).tolist(), dtype=torch.float64)
        return None

    def token_id(self, key: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is None or value in (-1, 2**32 - 1):  # none
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.refusal(
                f"says tokenizer.ggml.{key}: {value!r}, and has {len(self.tokens)} tokens"
            )
        return value

    @cached_property
    def ends(self) -> list[int]:
        """Ids that end an answer: of a text, of a turn, of a message."""
        ids = [self.token_id(key) for key in _ENDS]
        return list(dict.fromkeys(id_ for id_ in ids if id_ is not None))
