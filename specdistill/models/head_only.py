"""Models without their weights, or most of them: what training from a kept signal needs of a
target, and what is to be known of a pair that another program loads.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from specdistill.errors import ModelError, model_errors
from specdistill.limits import Dtype
from specdistill.models import LanguageModel, choose_device, choose_dtype, load, locate
from specdistill.models.checkpoint_files import weight_files
from specdistill.models.loading import (
    check_numbers,
    read_generation_config,
    read_tokenizer,
    read_vocab,
)
from specdistill.models.support import check_decodable, empty_model, read_config


def load_head(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """The model's configuration, tokenizer and last layer. The rest stays on the meta device: it
    takes no memory and cannot run. A family that keeps its head under another name in its files
    than in its modules is read whole, with a warning, and its body dropped. Raises
    `ModelError` as `load`.
    """
    outline = load_outline(name, dtype=dtype, device=device)
    model, head, vocab = outline.model, outline.head, outline.vocab
    files = weight_files(outline.path)
    with model_errors(f"cannot load the head of {name}"):
        parts = [_read(files, model, part) for part in head.parameters()]
    if any(part is None for part in parts):
        warnings.warn(
            f"the files of {name} keep its head under a name that is not known here, so the whole "
            "model is read for it, which takes the memory of the model for a while",
            stacklevel=2,
        )
        whole = load(name, dtype=dtype, device=device).head
        parts = [part.detach() for part in whole.parameters()]
    if vocab is not None and parts[0] is not None and len(parts[0]) != len(vocab):
        raise ModelError(
            f"{name} has {len(parts[0])} rows in its head and {len(vocab)} tokens in its trimmed "
            "vocabulary; make the draft anew"
        )
    where, kind = torch.device(choose_device(device)), outline.dtype
    real = nn.Linear(head.in_features, head.out_features, len(parts) > 1, device="meta")
    for (label, _), part in zip(list(real.named_parameters()), parts, strict=True):
        assert part is not None
        setattr(real, label, nn.Parameter(part.to(where, kind), requires_grad=False))
    check_numbers(name, real)
    model.set_output_embeddings(real)
    return replace(outline, model=model)


def load_outline(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """The model's configuration and tokenizer, its weights on the meta device: no memory for them,
    and no pass. `dtype` "auto" is that of `device`. Raises `ModelError` as `load`, but for weights,
    which it does not read.
    """
    path = locate(name)
    kind = choose_dtype(dtype, torch.device(choose_device(device)))
    config = read_config(name, path)
    check_decodable(name, config)
    weight_files(path)
    vocab = read_vocab(path, config.get_text_config().vocab_size)
    model = empty_model(name, config).to(kind).eval().requires_grad_(False)
    read_generation_config(name, path, model)
    return LanguageModel(name, path, model, read_tokenizer(name, path), vocab)


def _read(files: list[Path], model: nn.Module, part: Tensor) -> Tensor | None:
    """A parameter of the head, as Transformers would load it: by its own name where the files have
    that, whatever the config says of tying, and else as the embedding that it is tied to. None
    where they have neither, or what may be the head under a name that is not understood here.
    """
    names = _names(model, part)
    stored = {key: file for file in files for key in _keys(file)}  # of equals the last file's
    ending = names[0].rsplit(".", 2)[-2:]
    for name in names:
        if name in stored:
            with safe_open(stored[name], framework="pt") as tensors:
                tensor = tensors.get_tensor(name)
            return tensor if tensor.shape == part.shape else None
        if any(key.split(".")[-2:] == ending for key in stored):
            return None
    return None


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _names(model: nn.Module, part: Tensor) -> list[str]:
    """Every name of a parameter, that of an embedding last."""
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is part]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return sorted(names, key=lambda name: isinstance(owners[name], nn.Embedding))
