"""Low-rank adaptation of a draft (LoRA, 2106.09685), by peft. While it is trained every linear map
of its layers has two small factors beside it; at the end they are added to the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from specdistill.config import Lora
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.randomness import seeded

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel
    from transformers import PreTrainedModel


def adapt(draft: LanguageModel, lora: Lora, seed: int) -> LoraModel:
    """Put the factors into the draft; they alone can then be trained. Raises `InputError` where
    peft is missing, or refuses the draft.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise InputError('training.lora needs peft: pip install "specdistill[lora]"') from None
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")
    vars(draft).pop("body", None)  # it was made of the layers before
    try:
        with seeded(seed, draft.device):
            return LoraModel(draft.model, settings, "default")
    except ValueError as error:
        raise InputError(f"training.lora: peft cannot adapt {draft.name}: {error}") from error


def merge(draft: LanguageModel, adapted: LoraModel) -> None:
    """Add the factors' products to the weights: the draft is an ordinary checkpoint again."""
    draft.model = cast("PreTrainedModel", adapted.merge_and_unload())
    vars(draft).pop("body", None)
