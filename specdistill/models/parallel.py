"""A draft that proposes a whole block in one pass: it reads a mask token in the place of each token
that it cannot know yet (PARD, 2504.18583). Its config.json names that token as engines look for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from specdistill.errors import InputError

if TYPE_CHECKING:
    from specdistill.models.language_model import LanguageModel

PARD_TOKEN, KIND = "pard_token", "spd_type"  # keys of config.json that vLLM and PARD's authors read
ORIGIN = "specdistill"  # the key of what only this project writes
NUM_DRAFT_TOKENS = "num_draft_tokens"  # in it: the block that a parallel draft is trained for

# Special tokens of pretraining, or kept for later, that no conversation holds: of Llama 3, Gemma,
# Phi, Mistral, and of the StarCoder family, whose tokenizer SmolLM2 has.
_RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<\|?reserved[_-]?\d*\|?>|<unused\d+>|<\|dummy_\d+\|>"
    r"|<\|placeholder\d+\|>|\[control_\d+\]|<SPECIAL_\d+>|<\|extra_\d+\|>|<extra_id_\d+>"
    r"|<(repo_?name|file_sep|filename|gh_stars|issue_(start|comment|closed)|empty_output"
    r"|jupyter_(start|text|code|output|script))>"
)


def trained_draft_tokens(model: LanguageModel) -> int | None:
    """How many tokens a parallel draft was trained to propose at once (γ); None where its
    config.json does not say, as that of a draft made elsewhere.
    """
    block = getattr(model.model.config, ORIGIN, None)
    number = block.get(NUM_DRAFT_TOKENS) if isinstance(block, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def set_parallel(model: LanguageModel, mask_token: int, num_draft_tokens: int) -> None:
    """Say in the model's config.json that it drafts in parallel: by which token, and how many
    tokens it is trained to propose. Raises `InputError` for a token it has no embedding for.
    """
    if not 0 <= mask_token < model.full_vocab_size:
        raise InputError(
            f"parallel.mask_token is {mask_token}, and {model.name} reads the ids 0 to "
            f"{model.full_vocab_size - 1}; name one of them that no text holds"
        )
    config: Any = model.model.config
    config.pard_token, config.spd_type = mask_token, "pard"
    block = getattr(config, ORIGIN, None) or {}
    setattr(config, ORIGIN, {**block, NUM_DRAFT_TOKENS: num_draft_tokens})


def choose_mask_token(target: LanguageModel) -> int:
    """An id that no text of the target holds, with a row in its embedding: the first row that only
    pads it, else the last special token that is reserved, by its form, and that the chat template
    does not write. Raises `InputError` where there is none.
    """
    tokenizer = target.tokenizer
    padding = 1 + max(tokenizer.get_vocab().values())
    if padding < target.vocab_size:
        return padding
    written = str(tokenizer.chat_template or "")
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    reserved = [
        number
        for number, token in added.items()
        if number < target.vocab_size
        and _RESERVED.fullmatch(token.content)
        and token.content not in written
        and number not in (*target.eos_ids, tokenizer.bos_token_id, tokenizer.pad_token_id)
    ]
    if not reserved:
        raise InputError(
            f"{target.name} has no unused token for a parallel draft's mask: its tokenizer takes "
            f"all of its {target.vocab_size} rows, and none of its special tokens is known to be "
            "reserved; name the id of one that no text holds by parallel.mask_token"
        )
    return max(reserved)
