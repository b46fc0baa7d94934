"""The tokenizer of a converted GGUF file, compared with the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdistill.models.gguf_contents import SPECIAL, Contents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ways to cut text into words that Transformers follows; others it would cut as GPT-2 does.
_LIKE_GPT2 = {None, "default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "smollm"}


def convert_tokenizer(contents: Contents, folder: Path) -> None:
    """Raises `ModelError` where the vocabulary or its special tokens would not be the file's."""
    from transformers import AutoTokenizer

    _check_splitting(contents)
    file = contents.file
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    # Transformers gives every vocabulary the special tokens of the class that it takes for it.
    written = folder / "tokenizer.json"
    parts = json.loads(written.read_text(encoding="utf-8"))
    added = parts.get("added_tokens", [])
    parts["added_tokens"] = [token for token in added if token["id"] < len(contents.tokens)]
    if len(parts["added_tokens"]) < len(added):
        written.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    _check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), contents)


def _check_splitting(contents: Contents) -> None:
    kind, pre = (contents.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre in _LIKE_GPT2:
        return
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping

        known: Mapping[str, Any] = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    except (ImportError, AttributeError):  # other versions keep it elsewhere
        return
    if pre not in known:
        raise contents.refusal(
            f"says tokenizer.ggml.pre: {pre}, a way to cut text into words that is not known here; "
            "take the model's original checkpoint"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, contents: Contents) -> None:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    names = {index: token for token, index in vocabulary.items()}
    for index, token in enumerate(contents.tokens):
        if names.get(index) not in {token, _spelled(token), token.replace(" ", "\u2581")}:
            raise contents.refusal(
                f"has the token {index} {token!r}, which its tokenizer in Transformers would have "
                f"as {names.get(index)!r}"
            )
    if len(vocabulary) != len(contents.tokens):
        raise contents.refusal(
            f"has {len(contents.tokens)} tokens, and its tokenizer in Transformers "
            f"{len(vocabulary)}"
        )
    for name, key in SPECIAL.items():
        wanted, written = contents.token_id(key), getattr(tokenizer, f"{name}_id")
        if wanted != written:
            raise contents.refusal(
                f"says tokenizer.ggml.{key}: {wanted}, which would become {written}"
            )
    template = contents.metadata.get("tokenizer.chat_template")
    if template is not None and tokenizer.chat_template != template:
        raise contents.refusal("has a chat template that its tokenizer would not take")
    wanted = contents.metadata.get("tokenizer.ggml.add_bos_token")
    if wanted is not None and tokenizer.bos_token_id is not None:
        begins = tokenizer(contents.tokens[-1])["input_ids"][:1] == [tokenizer.bos_token_id]
        if begins != wanted:
            raise contents.refusal(
                f"says tokenizer.ggml.add_bos_token: {wanted}, which its tokenizer would not do"
            )


def _spelled(token: str) -> str:
    """Its bytes in the letters that byte-level vocabularies write them in."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return "".join(letters[byte] for byte in token.encode())
