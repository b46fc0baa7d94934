"""Settings in turns: each prompt is decoded in all of them before the next one, in one process, so
that a drift of the machine's speed falls on all alike. For our engine and for others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from specdistill.progress import Progress
from specdistill.scoring.choice import Setting

MIN_PROMPTS = 4
T = TypeVar("T")
Answers = dict[Setting, list[list[T]]]  # by prompt, as often as it was decoded


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What every setting came to; `stalls` is the share of time that was left out of it, `steal`
    what others had of the processors, `again` the temperature that was measured twice.
    """

    runs: dict[Setting, T]
    steal: float | None
    stalls: float
    again: float | None

    @property
    def facts(self) -> dict[str, Any]:
        """As a card's provenance has them."""
        return {"steal": self.steal, "stalls": self.stalls, "measured_again": self.again}


R = TypeVar("R")


def measured(
    ask: Callable[[Setting, int], T],
    temperatures: Sequence[float],
    num_draft_tokens: Sequence[int],
    prompts: int,
    without_stalls: Callable[[Answers[T]], tuple[dict[Setting, R], float]],
    slowed: Callable[[Mapping[Setting, R]], float | None],
    progress: Progress,
    max_seconds: float | None = None,
) -> Measured[R]:
    """What `ask` answers to each prompt, by its number, in each setting; see `settled`."""
    score, again = partial(progress, "score"), partial(progress, "again")

    def first() -> Answers[T]:
        return by_turns(ask, temperatures, num_draft_tokens, prompts, score, max_seconds)

    def once_more(temperature: float, number: int) -> Answers[T]:
        return by_turns(ask, [temperature], num_draft_tokens, number, again)

    return settled(first, once_more, without_stalls, slowed)


def settled(
    first: Callable[[], Answers[T]],
    again: Callable[[float, int], Answers[T]],
    without_stalls: Callable[[Answers[T]], tuple[dict[Setting, R], float]],
    slowed: Callable[[Mapping[Setting, R]], float | None],
) -> Measured[R]:
    """What all settings came to `first`, made into runs by `without_stalls`. The temperature at
    which plain decoding was `slowed` is measured `again`, for as many prompts, once: a machine that
    is never at rest is told of, not waited for.
    """
    before = cpu_times()
    answers = first()
    runs, stalls = without_stalls(answers)
    temperature = slowed(runs)
    if temperature is not None:
        answers |= again(temperature, len(answers[temperature, 0]))
        runs, stalls = without_stalls(answers)
    return Measured(runs, stolen(before), stalls, temperature)


def by_turns(
    ask: Callable[[Setting, int], T],
    temperatures: Sequence[float],
    num_draft_tokens: Sequence[int],
    prompts: int,
    progress: Callable[[float, float, str], None],
    max_seconds: float | None = None,
) -> Answers[T]:
    """All answers, or those to the first prompts: after `max_seconds` no further one is begun, once
    there are `MIN_PROMPTS`.
    """
    answers: Answers[T] = {(t, g): [] for t in temperatures for g in (0, *num_draft_tokens)}
    words = f"{len(answers)} settings a prompt"
    begin = time.perf_counter()
    for number in range(prompts):
        for by_prompt in answers.values():
            by_prompt.append([])
        turns = in_turn(temperatures, num_draft_tokens, number)
        for turn, setting in enumerate(turns):
            progress(number + turn / len(turns), prompts, words)
            answers[setting][number].append(ask(setting, number))
        late = max_seconds is not None and time.perf_counter() - begin > max_seconds
        if late and MIN_PROMPTS <= number + 1 < prompts:
            words = "out of time; the rest is left out"
            break
    progress(prompts, prompts, words)
    return answers


def in_turn(
    temperatures: Sequence[float], num_draft_tokens: Sequence[int], number: int
) -> list[Setting]:
    """What a prompt is decoded in, in this order: at each temperature plainly, with every γ, and
    plainly again. Each `number` starts from another temperature and another γ.
    """
    return [
        (t, g)
        for t in _from(temperatures, number)
        for g in (0, *_from(num_draft_tokens, number), 0)
    ]


def _from(values: Sequence[T], number: int) -> list[T]:
    first = number % len(values)
    return [*values[first:], *values[:first]]


def cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """The time that a hypervisor gave to others (steal) and all time of the processors so far, in
    ticks; None on systems that do not tell.
    """
    try:
        name, *ticks = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        counts = [int(tick) for tick in ticks[:8]]  # a guest's, which follow, are in user's
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(counts) < 8:
        return None
    return counts[7], sum(counts)


def stolen(before: tuple[int, int] | None) -> float | None:
    """The share of the processors' time that went to others since `before`."""
    now = cpu_times()
    if before is None or now is None:
        return None
    steal, total = (b - a for a, b in zip(before, now, strict=True))
    return steal / total if total > 0 else 0.0
