"""The models of a run: what is read of each, and the draft as one that can be trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from specdistill import models
from specdistill.config import DistillConfig
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.head_only import load_head
from specdistill.models.packing import is_packed, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_models(
    config: DistillConfig,
    target: LanguageModel | str | Path | None = None,
    draft: LanguageModel | str | Path | None = None,
) -> tuple[LanguageModel | None, LanguageModel]:
    """The pair a configuration names, or what is given of it: no target where its text alone is
    learnt from, and its head alone where nothing needs more; the draft in float32.
    """
    teacher = None
    if config.signal != "none":
        whole = config.signal == "live" or config.decode is not None
        read = models.load if whole else load_head
        if isinstance(target, LanguageModel):
            teacher = target
        else:
            teacher = read(config.target, dtype=config.dtype, device=config.device)
    if isinstance(draft, LanguageModel):
        student = trainable(draft)
    else:
        student = models.load(config.draft, dtype="float32", device=config.device)
    if teacher is not None:
        models.check_pair(teacher, student)
    return teacher, student


def trainable(draft: LanguageModel) -> LanguageModel:
    """A copy to train, which leaves the draft as it is: in float32 at least, with linear layers
    that have no packed weights.
    """
    model: nn.Module = unpacked(copy.deepcopy(draft.model))
    kind = torch.promote_types(draft.dtype, torch.float32)
    return replace(draft, model=cast("PreTrainedModel", model.to(kind)))


def check_trainable(draft: LanguageModel) -> None:
    """Raises `InputError` for weights in which small updates would be lost or that are not what the
    draft computes with.
    """
    half = {p.dtype for p in draft.model.parameters()} & {torch.bfloat16, torch.float16}
    if half:
        raise InputError(
            f"the draft {draft.name} has weights in {', '.join(sorted(map(str, half)))}, in which "
            "updates would round to nothing; load it with dtype='float32'"
        )
    if is_packed(draft):
        raise InputError(
            f"the draft {draft.name} is packed for decoding, and packed weights do not follow an "
            "update; load it again"
        )
