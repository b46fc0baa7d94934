"""Text from tokens that come a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # what stands at the end of a text whose last character is not whole yet


class Detokenizer:
    """Turns one text's tokens into its characters, none of them split: what `add` returns, joined,
    and then `end`, is what the tokenizer makes of all tokens at once. `after` are the tokens that
    went before, such as the prompt's, so that a space between them and the first is not lost.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        after: Sequence[int] = (),
        *,
        skip_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self.tokens = list(after)
        # Tokens before `_known` are told; those from `_start` on show how the next are joined.
        self._start, self._known = 0, len(self.tokens)

    def add(self, tokens: Iterable[int]) -> str:
        """The characters that these tokens complete, perhaps none."""
        self.tokens += tokens
        return self._new(whole=True)

    def end(self) -> str:
        """What is left, where the text ends within a character."""
        return self._new(whole=False)

    def _new(self, whole: bool) -> str:
        before, text = self._text(self._known), self._text(len(self.tokens))
        if whole and text.endswith(HALF):
            return ""
        same = len(before) if text.startswith(before) else len(before.rstrip(HALF))
        self._start, self._known = self._known, len(self.tokens)
        return text[same:]

    def _text(self, stop: int) -> str:
        tokens = self.tokens[self._start : stop]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens))
