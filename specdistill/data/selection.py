"""Which of the answers to a prompt is kept: of those that the filters leave, the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specdistill.data.filters import NO_FILTER, Filters, Judged, objection
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import (
    EXACT_MATCH,
    LOG_PROBABILITY,
    BestOf,
    Candidate,
    Scorer,
    best,
    find_scorer,
)
from specdistill.decoding import Sampling
from specdistill.errors import InputError

SCORER = "scorer"  # why an answer goes that no filter objects to


@dataclass(frozen=True)
class Selection:
    """Filters, then the scorer's choice among `number` answers; see `checked`."""

    filters: Filters = NO_FILTER
    best_of: BestOf | None = None
    scorer: Scorer | None = None

    @classmethod
    def checked(
        cls,
        filters: Filters,
        best_of: BestOf | None,
        prompts: Sequence[Prompt],
        samplings: Sequence[Sampling],
    ) -> Selection:
        """Raises `InputError` for what has no effect, and for a prompt the scorer cannot judge: now
        and not after hours.
        """
        if filters.retries and not filters.remove and best_of is None:
            raise InputError(
                f"retries: {filters.retries} has no effect without a filter that removes answers"
            )
        if filters.retries and all(sampling.temperature == 0 for sampling in samplings):
            raise InputError(
                f"retries: {filters.retries} has no effect at temperature 0, where the same prompt "
                "has the same answer; sample them, or leave it out"
            )
        if best_of is None:
            return cls(filters)
        if best_of.number > 1 and any(sampling.temperature == 0 for sampling in samplings):
            raise InputError(
                f"best_of: {best_of.number} answers at temperature 0 are one and the same; sample "
                "them"
            )
        scorer = find_scorer(best_of.scorer)
        if best_of.scorer == EXACT_MATCH:
            for prompt in prompts:
                scorer(prompt, [])
        return cls(filters, best_of, scorer)

    @property
    def number(self) -> int:
        """Answers to a prompt that are asked for at once."""
        return 1 if self.best_of is None else self.best_of.number

    def attempts(self, round_: int) -> range:
        """The answers of a round among all of a prompt's, counted from 0."""
        return range(round_ * self.number, (round_ + 1) * self.number)

    @property
    def settings(self) -> dict[str, Any]:
        """As manifests have them."""
        choice = {} if self.best_of is None else {"best_of": asdict(self.best_of)}
        return {"filters": asdict(self.filters), **choice}

    @property
    def reads_log_probability(self) -> bool:
        return self.best_of is not None and self.best_of.scorer == LOG_PROBABILITY

    def choose(
        self, prompt: Prompt, answers: Sequence[Judged], candidate: Callable[[int], Candidate]
    ) -> tuple[int | None, list[str]]:
        """The place of the answer that is kept, if one is, and why others are not; those that are
        merely not the best are not named. The scorer sees the `candidate` of a place.
        """
        objections = [objection(self.filters, answer) for answer in answers]
        left = [place for place, why in enumerate(objections) if why is None]
        chosen = left[0] if left else None
        if left and self.scorer is not None:
            place = best(prompt, [candidate(place) for place in left], self.scorer)
            chosen = None if place is None else left[place]
        return chosen, [why or SCORER for why in objections if why or chosen is None]
