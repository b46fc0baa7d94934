"""Prompts for Python: read, and split into some to train on and others to score on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from specdistill.data.decoder import Messages
from specdistill.data.likeness import split_prompts
from specdistill.data.prompts import Prompt, as_prompt, load_prompts


class PromptList(list[Prompt]):
    """Prompts in their order."""

    def split(self, heldout: int = 32, seed: int = 0) -> tuple[PromptList, PromptList]:
        """The prompts to train on and about `heldout` others, see `split_prompts`. Warns where near
        copies come to both sides.
        """
        train, others = split_prompts(self, heldout, seed, warnings.warn)
        return PromptList(train), PromptList(others)


def prompts(source: str | Iterable[str | Messages], **options: Any) -> PromptList:
    """The prompts of a file, a data set or the demo, with the options of `load_prompts`; or texts
    and chat messages themselves. Raises `InputError`.
    """
    if isinstance(source, str):
        return PromptList(load_prompts(source, **options))
    return PromptList(as_prompt(asked, number) for number, asked in enumerate(source, 1))
