"""Target and draft models: found, loaded, checked, and read as hidden states and a head."""

from specdistill.models.hub import locate
from specdistill.models.language_model import LanguageModel, origin, set_origin
from specdistill.models.loading import choose_device, choose_dtype, load, stored_dtype
from specdistill.models.pairs import check_pair, check_positions, check_sizes, check_tokens
from specdistill.models.parallel import choose_mask_token, set_parallel, trained_draft_tokens

__all__ = [
    "LanguageModel",
    "check_pair",
    "check_positions",
    "check_sizes",
    "check_tokens",
    "choose_device",
    "choose_dtype",
    "choose_mask_token",
    "load",
    "locate",
    "origin",
    "set_origin",
    "set_parallel",
    "stored_dtype",
    "trained_draft_tokens",
]
