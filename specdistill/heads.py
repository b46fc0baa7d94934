"""A target without its body: what training from a kept signal needs of it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specdistill.errors import ModelError
from specdistill.models import (
    LanguageModel,
    choose_device,
    choose_dtype,
    load,
    locate,
    read_vocab,
)
from specdistill.options import Dtype


def load_head(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """The model's configuration, tokenizer and last layer. The rest stays on the meta device: it
    takes no memory and cannot run. A family that keeps its head under another name in its files
    than in its modules is read whole, and its body dropped. Raises `ModelError` as `load`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = locate(name)
    where = torch.device(choose_device(device))
    kind = choose_dtype(dtype, where)
    try:
        vocab = read_vocab(path)
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
        head = model.get_output_embeddings()
        parts = [_read(path, _names(model, part)) for part in head.parameters()]
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load the head of {name}: {error}") from error
    if any(part is None for part in parts):
        whole = load(name, dtype=dtype, device=device).head
        parts = [part.detach() for part in whole.parameters()]
    real = nn.Linear(head.in_features, head.out_features, len(parts) > 1, device="meta")
    for (label, _), part in zip(list(real.named_parameters()), parts, strict=True):
        assert part is not None
        setattr(real, label, nn.Parameter(part.to(where, kind), requires_grad=False))
    model.set_output_embeddings(real)
    return LanguageModel(name, path, model.eval().requires_grad_(False), tokenizer, vocab)


def _names(model: nn.Module, part: Tensor) -> set[str]:
    """Every name of a parameter: a tied head is saved as the embedding."""
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p is part}


def _read(path: Path, names: set[str]) -> Tensor | None:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in names & set(tensors.keys()):
                return tensors.get_tensor(name)
    return None
