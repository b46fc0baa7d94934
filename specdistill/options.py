"""What options may say: names of dtypes, and the command line's small languages for numbers of
draft tokens, temperatures and a lenience. Raises `InputError` for what they do not hold.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from specdistill.errors import InputError
from specdistill.limits import MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from specdistill_kernels import Lenience

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]


def whole_numbers(text: str) -> list[int]:
    """ "4", "1-8" or "2,4,6" to numbers of draft tokens."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise InputError(f"--num-draft-tokens must look like 4, 1-8 or 2,4,6; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= MAX_DRAFT_TOKENS:
            raise InputError(
                f"--num-draft-tokens must be 1 to {MAX_DRAFT_TOKENS}; got {part.strip()!r}"
            )
        numbers += range(first, last + 1)
    return sorted(set(numbers))


def temperatures(text: str) -> list[float]:
    """ "0" or "0,1" to temperatures."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--temperature must look like 0 or 0,1; got {text!r}") from None
    if not all(0 <= value < float("inf") for value in values):
        raise InputError(f"--temperature must be 0 (greedy) or more; got {text!r}")
    return sorted(set(values))


def match(text: str) -> float | None:
    """ "cost:9.5" to the ratio of prices; None for "compute"."""
    found = re.fullmatch(r"cost:(\d+(?:\.\d+)?)", text)
    if text != "compute" and found is None:
        raise InputError(
            "--match must be compute, or cost:X where an answer of the target costs X of the "
            f"generator's; got {text!r}"
        )
    return None if found is None else float(found[1])


def lenience(text: str) -> Lenience:
    """ "lin:0.5" to the rule."""
    from specdistill_kernels import Lenience

    match = re.fullmatch(r"(lin|sq|exp):(0?\.\d+)", text)
    if match is None or float(match[2]) == 0:
        raise InputError(
            "--lenience must look like lin:0.5, sq:0.7 or exp:0.8, the number between 0 and 1 (1 "
            f"would be the exact rule); got {text!r}"
        )
    return Lenience(match[1], float(match[2]))  # type: ignore[arg-type]
