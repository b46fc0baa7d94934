"""What a source of answers holds: tokens, as `generate` writes them, or text, be it of `ask` or a
response that each prompt has of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from specdistill.data.prompts import Turns, load_prompts
from specdistill.data.settings import with_settings
from specdistill.data.text_store import ANSWERS, TextAnswer, holds_text, read_answers
from specdistill.data.token_store import MANIFEST, Example, Manifest, read_examples, read_manifest
from specdistill.errors import InputError
from specdistill.models.hashes import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenAnswers:
    """A folder of `generate`: answers in the target's tokens, and what was kept of its signal. All
    that reads it raises `InputError` and `StorageError` as `read_manifest` and `read_examples`.
    """

    source: str
    generated: ClassVar[bool] = True

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(Path(self.source))

    def sha256(self) -> str | None:
        """Hash of what says which answers there are."""
        return file_sha256(Path(self.source) / MANIFEST)

    def examples(self, *, signal: bool) -> list[Example]:
        return read_examples(Path(self.source), signal=signal)

    def token_lists(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The answers."""
        return [example.response_tokens for example in self.examples(signal=False)]


@dataclass(frozen=True)
class TextAnswers:
    """A folder of `ask`, or, not `generated`, prompts with responses of their own. Reading it
    raises as `read_answers` and `load_prompts`.
    """

    source: str
    generated: bool

    def sha256(self) -> str | None:
        """Hash of the file; None for what is not here."""
        files = Path(self.source), Path(self.source) / ANSWERS, Path(self.source) / MANIFEST
        return next((file_sha256(file) for file in files if file.is_file()), None)

    def answers(
        self, turns: Turns = "last", settings: Mapping[str, Any] | None = None
    ) -> list[TextAnswer]:
        """Prompts whose response is the answer, if they have one; `turns` of conversations and
        `settings` of the chat template as in `load_prompts`. What the last turn of a conversation
        asks may be left unanswered, and is left out.
        """
        if self.generated:
            read = read_answers(Path(self.source))
            put = with_settings([answer.prompt for answer in read], settings or {})
            return [replace(a, prompt=p) for a, p in zip(read, put, strict=True)]
        prompts = load_prompts(self.source, turns=turns, chat_template_kwargs=settings)
        asked = [p for p in prompts if p.conversation is None or p.one_response() is not None]
        return [TextAnswer(prompt, ended=True) for prompt in asked]

    def token_lists(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The answers, or, where there are none, what the prompts say."""
        prompts = [answer.prompt for answer in self.answers()]
        texts = [r for p in prompts if (r := p.one_response())] or [
            m["content"] for p in prompts for m in p.messages
        ]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def open_answers(source: str) -> TokenAnswers | TextAnswers:
    """What `source`, a folder or a source of prompts, holds. Nothing is read yet. Raises
    `InputError` where there is nothing: an id of a hub would need a split, which nobody gives here.
    """
    if holds_text(source):
        return TextAnswers(source, generated=True)
    if (Path(source) / MANIFEST).exists():
        return TokenAnswers(source)
    if not source.startswith("demo:") and not Path(source).exists():
        raise InputError(
            f"there are no answers in {source}, which does not exist; give a folder of `generate` "
            "or of `ask`, or a .jsonl or .txt file"
        )
    return TextAnswers(source, generated=False)
