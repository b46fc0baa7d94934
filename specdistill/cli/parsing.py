"""The command line's small languages: numbers of draft tokens, temperatures, a price, a lenience.
Raises `InputError` for what they do not hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from specdistill import limits
from specdistill.data.rows import parsed
from specdistill.errors import InputError
from specdistill.limits import shown

if TYPE_CHECKING:
    from specdistill_kernels import Lenience


def chat_template_kwargs(text: str | None) -> dict[str, Any] | None:
    """'{"enable_thinking": false}' to what a chat template is told."""
    if text is None:
        return None
    return _object(text, "--chat-template-kwargs", '{"enable_thinking": false}')


def speculative_config(text: str) -> dict[str, Any]:
    """'{"method": "ngram"}' to what vLLM is told."""
    return _object(text, "--speculative-config", '{"method": "ngram"}')


def engine_options(text: str | None, reserved: Mapping[str, str]) -> dict[str, Any]:
    """'{"quantization": "fp8"}' to more arguments of vLLM's `LLM`, but for those that are not the
    user's to set, and why.
    """
    if text is None:
        return {}
    options = _object(text, "--engine-options", '{"quantization": "fp8"}')
    for name in options:
        if name in reserved:
            raise InputError(f"--engine-options: {name!r} is not for it: {reserved[name]}")
    return options


def _object(text: str, option: str, example: str) -> dict[str, Any]:
    advice = f"write an object, as '{example}'"
    value = parsed(text, option, "not valid JSON", advice)
    if not isinstance(value, dict):
        raise InputError(f"{option}: {advice}; got {shown(text)}")
    return value


def whole_numbers(text: str) -> list[int]:
    """ "4", "1-8" or "2,4,6" to numbers of draft tokens."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        if not match:
            raise InputError(
                f"--num-draft-tokens must look like 4, 1-8 or 2,4,6; got {shown(text)}"
            )
        first, last = (_whole(digits) for digits in (match[1], match[2] or match[1]))
        if not 1 <= first <= last <= limits.MAX_DRAFT_TOKENS:
            raise InputError(
                f"--num-draft-tokens must be {limits.words(limits.DRAFT_TOKENS)}; got "
                f"{shown(part.strip())}"
            )
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def concurrency(text: str) -> list[int]:
    """ "1,4,16" to numbers of requests at a time."""
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise InputError(f"--concurrency must look like 1,4,16; got {shown(text)}")
    numbers = sorted({int(part) for part in text.split(",")})
    for number in numbers:
        limits.check("--concurrency", number, limits.QUESTIONS)
    return numbers


def _whole(digits: str) -> int:
    """Python reads no number of more than 4,300 digits, and nothing here is near that."""
    return int(digits) if len(digits) < 20 else 10**20


def temperatures(text: str) -> list[float]:
    """ "0" or "0,1" to temperatures."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--temperature must look like 0 or 0,1; got {shown(text)}") from None
    for value in values:
        limits.check("--temperature", value, limits.TEMPERATURE, off=0)
    return sorted(set(values))


def match(text: str) -> float | Literal["compute"]:
    """ "compute", or "cost:9.5" to the ratio of prices."""
    if text == "compute":
        return "compute"
    cost = re.fullmatch(r"cost:([0-9]+(?:\.[0-9]+)?)", text)
    if cost is None:
        raise InputError(
            "--match must be compute, or cost:X where an answer of the target costs X of the "
            f"generator's; got {shown(text)}"
        )
    limits.check("the price of --match cost:X", float(cost[1]), limits.PRICES)
    return float(cost[1])


def lenience(text: str) -> Lenience:
    """ "lin:0.5" to the rule."""
    from specdistill_kernels import Lenience

    match = re.fullmatch(r"(lin|sq|exp):(0?\.[0-9]+)", text)
    if match is None or float(match[2]) == 0:
        raise InputError(
            "--lenience must look like lin:0.5, sq:0.7 or exp:0.8, the number between 0 and 1 (1 "
            f"would be the exact rule); got {shown(text)}"
        )
    return Lenience(match[1], float(match[2]))  # type: ignore[arg-type]
