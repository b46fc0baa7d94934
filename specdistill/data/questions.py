"""The engine's rounds, question by question: a prompt is asked as often as answers are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specdistill.data.prompts import Prompt
from specdistill.data.signal import States, TopK
from specdistill.data.token_store import Example
from specdistill.decoding import Request, Round, Sampling
from specdistill.decoding.sampling import row_seed


def answer_id(prompt_id: str, number: int) -> str:
    """What the draws of a prompt's several answers, from 0, are told apart by."""
    return f"{prompt_id}\n{number}" if number else prompt_id


def round_seed(seed: int, round_: int) -> int:
    """The run's seed, and another for each time that a prompt is asked again."""
    return row_seed(seed, f"retry {round_}") if round_ else seed


class AnyDecoder(Protocol):
    """What answers requests round by round: `SpeculativeDecoder`, or what stands in for it. A round
    without rows says that it has begun.
    """

    def stream(self, requests: Iterable[Request]) -> Iterator[Round]: ...


@dataclass(frozen=True)
class Question:
    """A prompt as the engine is asked it."""

    prompt: Prompt
    tokens: list[int]
    sampling: Sampling
    seed: int = 0

    def requests(self, number: int, max_new_tokens: int) -> list[Request]:
        ids = [answer_id(self.prompt.id, i) for i in range(number)]
        return [Request(i, self.tokens, max_new_tokens, self.sampling, self.seed) for i in ids]


def rounds(
    decoder: AnyDecoder, questions: Sequence[Question], number: int, max_new_tokens: int
) -> Iterator[tuple[list[tuple[Question, list[Example]]], Round]]:
    """For each round the questions whose last answer it ended, with their answers in order and all
    states that were kept, and the round itself.
    """
    requests = [r for question in questions for r in question.requests(number, max_new_tokens)]
    owners = {r.id: questions[i // number] for i, r in enumerate(requests)}
    rows = {
        r.id: Example(
            q.prompt.id, q.tokens, [], q.prompt.category, conversation=q.prompt.conversation
        )
        for r, q in zip(requests, owners.values(), strict=True)
    }
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {r.id: [] for r in requests}
    open_ = {question.prompt.id: number for question in questions}
    for round_ in decoder.stream(requests):
        ended = []
        for row in round_.rows:
            example, question = rows[row.request_id], owners[row.request_id]
            example.response_tokens += row.tokens
            if row.hidden is not None and row.logsumexp is not None:
                pieces[row.request_id].append((row.hidden, row.logsumexp))
            if row.finished:
                if states := pieces.pop(row.request_id):
                    hidden, logsumexp = map(torch.cat, zip(*states, strict=True))
                    example.signal = States(hidden, logsumexp)
                if (top := row.top) is not None:
                    example.signal = TopK.of(top)
                example.alpha_cost, example.log_prob = row.alpha_cost, row.log_prob
                open_[question.prompt.id] -= 1
                if not open_[question.prompt.id]:
                    asked = question.requests(number, max_new_tokens)
                    ended.append((question, [rows.pop(r.id) for r in asked]))
        yield ended, round_
