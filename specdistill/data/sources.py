"""What a source of texts holds, be it the answers of `generate` or a file of prompts and their
responses: token lists to count a vocabulary in, and a hash.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specdistill.data.prompts import load_prompts
from specdistill.data.text_store import ANSWERS, holds_answers, read_answers
from specdistill.data.token_store import MANIFEST, read_examples
from specdistill.models.hashes import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def source_sha256(source: str) -> str | None:
    """Hash of a file, or of what a folder of answers says of its own; None for what is not here."""
    path = Path(source)
    files = (path, path / ANSWERS, path / MANIFEST)
    return next((file_sha256(file) for file in files if file.is_file()), None)


def token_lists(source: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A folder made by `generate` gives its answers; .jsonl and .txt give their responses where
    they have any, else their prompts. Raises as `load_prompts` does.
    """
    if holds_answers(source):
        prompts = [answer.prompt for answer in read_answers(Path(source))]
    elif (Path(source) / MANIFEST).exists():
        return [example.response_tokens for example in read_examples(Path(source), signal=False)]
    else:
        prompts = load_prompts(source)
    texts = [r for p in prompts if (r := p.one_response())] or [
        m["content"] for p in prompts for m in p.messages
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
