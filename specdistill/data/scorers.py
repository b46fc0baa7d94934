"""Which of several answers to a prompt is kept. A scorer gives each one a number; the highest is
kept, the first of equals, and none where all are −inf. Adding one is one function and one entry in
`SCORERS`; a function of the user's own is named module:function.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdistill import limits
from specdistill.data.prompts import Prompt
from specdistill.errors import InputError

LOG_PROBABILITY, EXACT_MATCH, MAJORITY = "log-probability", "exact-match", "majority"
_BRACED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"  # as deep as \boxed{\frac{x^{2}}{3}}
_MARKED = re.compile(
    rf"####(?P<hash>.+)|\\boxed\{{(?P<boxed>{_BRACED})\}}|\banswer(?: is:?|:)(?P<words>.+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Candidate:
    """An answer: its text, and, where a scorer reads it, the mean of its tokens' log-probabilities
    under the model that wrote it, before temperature and filters.
    """

    text: str
    log_probability: float = math.nan


Scorer = Callable[[Prompt, Sequence[Candidate]], Sequence[float]]


@dataclass(frozen=True)
class BestOf:
    """Of `number` answers to each prompt the one that `scorer` likes best is kept."""

    number: int
    scorer: str

    def __post_init__(self) -> None:
        limits.check("best_of", self.number, limits.ANSWERS)
        if self.number == 1 and self.scorer in (LOG_PROBABILITY, MAJORITY):
            raise InputError(
                f"the scorer {self.scorer!r} has no effect on a single answer; ask for more of them"
            )


def matched_number(number: int, cost_ratio: float) -> int:
    """How many answers a cheaper writer may give for what `number` of the target's cost, where one
    of the target's costs as much as `cost_ratio` of its own; rounded down. At equal compute that is
    the ratio of parameters (2408.16737). Raises `InputError` where the writer is not cheaper.
    """
    if not cost_ratio > 1:
        raise InputError(
            f"an answer of the target costs {cost_ratio:.3g} of the generator's: it is no cheaper, "
            "so let the target answer itself"
        )
    matched = int(min(number * cost_ratio, 1e9))
    limits.check(f"{number} answers of the target's in the generator's", matched, limits.ANSWERS)
    return matched


def log_probability(prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
    """The mean per token, so that length does not decide."""
    return [candidate.log_probability for candidate in candidates]


def exact_match(prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
    """0 for the final answer that the prompt's own response has, −inf for any other."""
    response = prompt.one_response()
    if not response:
        raise InputError(
            f"{prompt.named} has no answer of its own, with which the scorer 'exact-match' "
            'compares; give each one, as in {"prompt": "...", "answer": "42"}'
        )
    wanted = final_answer(response)
    return [0.0 if final_answer(c.text) == wanted else -math.inf for c in candidates]


def majority(prompt: Prompt, candidates: Sequence[Candidate]) -> list[float]:
    """How many of the answers end in the same final answer (self-consistency, 2203.11171)."""
    votes = Counter(final_answer(candidate.text) for candidate in candidates)
    return [float(votes[final_answer(candidate.text)]) for candidate in candidates]


SCORERS: dict[str, Scorer] = {
    LOG_PROBABILITY: log_probability,
    EXACT_MATCH: exact_match,
    MAJORITY: majority,
}


def final_answer(text: str) -> str:
    """What an answer comes down to: what follows the last "####", "Answer:" or "answer is", or
    stands in the last \\boxed{}, on its line; without any of these, the whole text. Case, white
    space, thousands separators in numbers, a currency sign before and a full stop after do not
    count.
    """
    marks = [m[m.lastgroup] for m in _MARKED.finditer(text) if m.lastgroup]
    answer = " ".join((marks[-1] if marks else text).split()).casefold()
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)
    return answer.strip("*$€£ .")


def find_scorer(name: str) -> Scorer:
    """The scorer of a name, or the user's, see `own_function`. Raises `InputError`."""
    if name in SCORERS:
        return SCORERS[name]
    function = own_function(name, "scorer", f"choose from {', '.join(SCORERS)}")
    return lambda prompt, candidates: function(prompt, [c.text for c in candidates])


def own_function(
    name: str, what: str, others: str
) -> Callable[[Prompt, Sequence[str]], list[float]]:
    """A function module:function of the user's, called with the prompt, see `Prompt`, and the list
    of answers' texts, that returns a number for each; the module may lie in the working directory.

    Raises `InputError`, which says `what` it is for, for a name that is none, a module or function
    that is not there or fails, and for what it returns where that are no numbers.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise InputError(
            f"unknown {what} {name!r}; {others}, or name a function of your own as module:function"
        )
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise InputError(
            f"the {what} {name!r} cannot be had: {type(error).__name__}: {error}; {module_name}.py "
            "must be installed or lie in the working directory"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise InputError(f"the {what} {name!r} is no function but {type(function).__name__}")

    def scores(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        try:
            return [float(score) for score in function(prompt, list(texts))]
        except (Exception, SystemExit) as error:  # it may call exit()
            raise InputError(
                f"the {what} {name!r} failed on {prompt.named}: {type(error).__name__}: {error}"
            ) from error

    return scores


def best(prompt: Prompt, candidates: Sequence[Candidate], scorer: Scorer) -> int | None:
    """The place of the answer that is kept; None where none is. Raises `InputError` for scores that
    are not one number an answer.
    """
    scores = list(scorer(prompt, candidates))
    if len(scores) != len(candidates) or any(math.isnan(score) for score in scores):
        raise InputError(
            f"the scorer gave {scores} for the {len(candidates)} answers to {prompt.named}; "
            "it must give a number for each, -inf for one that must not be kept"
        )
    place = max(range(len(scores)), key=lambda i: scores[i])
    return None if scores[place] == -math.inf else place
