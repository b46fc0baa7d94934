"""What chat templates are told besides messages, tools and documents: `enable_thinking`, a date.

A draft that was trained on answers with reasoning knows other texts than those without it. So a run
remembers the settings that its prompts were put with, and a score compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from specdistill.data.prompts import Prompt
from specdistill.data.rows import VARIABLES

Settings = Mapping[str, Any]


def settings_of(prompt: Prompt) -> dict[str, Any]:
    return {key: value for key, value in prompt.variables.items() if key not in VARIABLES}


def with_settings(prompts: Sequence[Prompt], settings: Settings) -> list[Prompt]:
    """The prompts with these settings, where they have none of that name themselves."""
    return [replace(p, variables={**settings, **p.variables}) for p in prompts]


def distinct(settings: Iterable[Settings]) -> list[dict[str, Any]]:
    """Each of them once, in an order of its own."""
    texts = {json.dumps(each, sort_keys=True, default=str) for each in settings}
    return [json.loads(text) for text in sorted(texts)]


def in_words(settings: Settings) -> str:
    """As JSON, as an option takes it; "none" where there are none."""
    return json.dumps(settings) if settings else "none"


def difference(scored: Sequence[Settings], trained: Sequence[Settings]) -> str:
    """A sentence where prompts of a score were put with settings that no prompt of the training
    was; empty where all agree or nobody knows of the training.
    """
    if not trained or not (other := [each for each in scored if each not in trained]):
        return ""
    return (
        f"the chat template was told {', '.join(map(in_words, other))} here, and in training "
        f"{', '.join(map(in_words, trained))}: the draft knows other texts than these, and accepts "
        "less; give --chat-template-kwargs as in training, or train it as it is served"
    )
