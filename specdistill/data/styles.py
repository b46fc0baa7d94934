"""How prompts are put to the target. A draft is trained on them as they were put, since that is the
context the answers belong to. Adding a style is one function and one entry in `STYLES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from specdistill.data.prompts import Prompt
from specdistill.errors import InputError

SHOTS = 4
ANSWER_MARK = "Answer:"
THINK = f"Think step by step. Then give the answer on a last line that begins with {ANSWER_MARK!r}."


def instruction(prompt: Prompt, examples: Sequence[Prompt]) -> Prompt:
    """The prompt as it is."""
    return prompt


def in_context(prompt: Prompt, examples: Sequence[Prompt]) -> Prompt:
    """Examples with their responses as earlier turns, behind what a system message says."""
    system = [turn for turn in prompt.messages[:1] if turn["role"] == "system"]
    shown: list[Mapping[str, Any]] = []
    for example in examples:
        shown += [turn for turn in example.messages if turn["role"] != "system"]
        answer = {"role": "assistant", "content": example.one_response() or "", **example.answer}
        shown.append(answer)
    return replace(prompt, messages=(*system, *shown, *prompt.messages[len(system) :]))


def chain_of_thought(prompt: Prompt, examples: Sequence[Prompt]) -> Prompt:
    """The reasoning is asked for and kept as part of the answer."""
    *before, last = prompt.messages
    asked = {**last, "content": f"{last['content']}\n\n{THINK}"}
    return replace(prompt, messages=(*before, asked))


STYLES: dict[str, Callable[[Prompt, Sequence[Prompt]], Prompt]] = {
    "instruction": instruction,
    "in-context": in_context,
    "chain-of-thought": chain_of_thought,
}


def styled(
    prompts: Sequence[Prompt],
    style: str,
    *,
    examples: Sequence[Prompt] = (),
    shots: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """The prompts in a style. "in-context" shows each of them `shots` of the examples (or
    `SHOTS`), drawn by the seed and its id, never one that asks the same.

    Raises `InputError` for an unknown style, examples that are missing, have no response or have no
    effect.
    """
    if style not in STYLES:
        raise InputError(f"unknown style {style!r}; choose from {', '.join(STYLES)}")
    if style == "in-context" and not examples:
        raise InputError(
            "the style 'in-context' shows examples: name a file of prompts with responses by "
            "--examples"
        )
    if examples and style != "in-context":
        raise InputError(
            f"examples go with the style 'in-context' and with no other; got {len(examples)} and "
            f"style {style!r}"
        )
    for example in examples:
        if not example.one_response():
            raise InputError(
                f"example {example.id!r} has no response to show; give each one, as in "
                '{"prompt": "...", "response": "..."}'
            )
    if shots is not None and not examples:
        raise InputError(f"--shots {shots} has no effect with the style {style!r}; leave it out")
    number = SHOTS if shots is None else shots
    if number < 1:
        raise InputError(f"shots, the examples shown, must be at least 1; got {shots}")
    put = []
    for prompt in prompts:
        others = [e for e in examples if e.messages[-1] != prompt.messages[-1]]
        drawn = random.Random(f"{seed}:{prompt.id}").sample(others, min(number, len(others)))
        put.append(STYLES[style](prompt, drawn))
    return put
