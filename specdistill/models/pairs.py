"""What must hold between a target, its draft and the texts they decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from specdistill.errors import InputError, ModelError
from specdistill.models.language_model import LanguageModel
from specdistill.models.rope import scaling, unscaled_positions


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
    """Refuse a pair whose tokens mean different things, whose draft is the larger of the two, or of
    which one is stretched for longer texts alone. Rows that only pad an embedding are understood:
    what must agree is the tokenizer's vocabulary. Raises `ModelError` with both sizes.
    """
    if target.vocab is not None:
        raise ModelError(
            f"{target.name} has a trimmed output vocabulary: it can be a draft, not a target"
        )
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        differing = sum(1 for token, index in ours.items() if theirs.get(token) != index)
        raise ModelError(
            f"the draft's vocabulary ({len(theirs)} tokens, {draft.name}) differs from the "
            f"target's ({len(ours)} tokens, {target.name}): {differing} of the target's tokens are "
            "missing or have another id. Take a draft of the target's family, make one from the "
            "target with `specdistill init`, or distil from the target's text alone: signal: none, "
            "loss: ce"
        )
    if draft.full_vocab_size < min(len(ours), target.full_vocab_size):
        raise ModelError(
            f"{draft.name} embeds {draft.full_vocab_size} ids, but its tokenizer has "
            f"{len(ours)} and {target.name} embeds {target.full_vocab_size}: tokens were added "
            "without resizing the draft; resize it (resize_token_embeddings) and train the new "
            "rows, or make one from the target with `specdistill init`"
        )
    large, small = (model.weight_bytes() // model.dtype.itemsize for model in (target, draft))
    if small > large:
        raise ModelError(
            f"the draft {draft.name} reads {small:,} weights for a token and the target "
            f"{target.name} {large:,}: a draft is the smaller of the two; were they swapped?"
        )
    _check_scaling(target, draft)


def _check_scaling(target: LanguageModel, draft: LanguageModel) -> None:
    """Of models for equally many positions, one must not be stretched to more than the other: a
    draft that is not guesses blindly where the target is. Models of other positions, or with other
    factors that come to the same (Llama 3.1 and 3.2), were trained so.
    """
    ours, theirs = target.config, draft.config
    shared = unscaled_positions(ours) & unscaled_positions(theirs)
    if not shared or target.max_length == draft.max_length or scaling(ours) == scaling(theirs):
        return
    both = " and ".join(
        f"{model.name} reads {model.max_length:,} positions ({_in_words(scaling(model.config))})"
        for model in (target, draft)
    )
    raise ModelError(
        f"the rotary positions of a pair must be stretched alike: {both}, both made for "
        f"{max(shared):,}. Write the target's rope_parameters into the draft's config.json, too, "
        "and distil it so, or take the target as it was trained"
    )


def _in_words(by_kind: dict[str, dict[str, Any]]) -> str:
    parts = [
        f"{kind} {settings}".strip()
        for kind, of_layers in by_kind.items()
        if (settings := ", ".join(f"{k}: {v}" for k, v in sorted(of_layers.items())))
    ]
    return "; ".join(parts) or "no scaling"


def check_sizes(target: LanguageModel, draft: LanguageModel) -> None:
    """Other engines want as many rows of both, padding included. Raises `ModelError`."""
    ours, theirs = target.full_vocab_size, draft.full_vocab_size
    if ours != theirs:
        raise ModelError(
            f"{draft.name} has {theirs} rows for tokens and {target.name} {ours}, padding "
            "included, which other engines refuse; write the draft at the target's size with "
            "`specdistill export --target`, and take that"
        )


def check_tokens(model: LanguageModel, tokens: Sequence[int], what: str) -> None:
    """Refuse ids that the model has no embedding for. Raises `InputError`."""
    rows = model.full_vocab_size
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is None:
        return
    if 0 <= beyond < len(model.tokenizer):
        raise InputError(
            f"{what} holds {model.tokenizer.convert_ids_to_tokens(beyond)!r}, id {beyond} of the "
            f"tokenizer of {model.name}, and the model reads 0 to {rows - 1}: the token was "
            "added without resizing the model. Resize it (resize_token_embeddings) and train the "
            "new rows, or leave the token out of the text"
        )
    raise InputError(
        f"{what} holds id {beyond}, and {model.name} reads 0 to {rows - 1}; encode it with "
        "the model's own tokenizer"
    )


def check_positions(models: Iterable[LanguageModel], texts: Iterable[tuple[str, int]]) -> None:
    """Refuse texts, by name and number of tokens, that are longer than a model reads. Raises
    `ModelError`.
    """
    longest = max(texts, key=lambda text: text[1], default=("", 0))
    for model in models:
        if longest[1] > model.max_length:
            raise ModelError(
                f"{longest[0]} comes to {longest[1]} tokens, and {model.name} reads "
                f"{model.max_length} positions; take shorter texts, fewer new tokens, or a model "
                "that reads more"
            )
