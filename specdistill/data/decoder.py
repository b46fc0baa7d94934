"""Speculative decoding for Python: texts or chat messages in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, Unpack, cast, overload

from specdistill import limits
from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import as_prompt
from specdistill.decoding import Detokenizer, Request, Sampling, SpeculativeDecoder, drafter_for
from specdistill.errors import InputError
from specdistill.models import LanguageModel, check_pair

Messages: TypeAlias = Sequence[Mapping[str, Any]]
NUM_DRAFT_TOKENS = 4


class Settings(TypedDict, total=False):
    """How to answer: up to `max_new_tokens` (256) tokens, at `temperature` 0 (greedy), with
    `top_k` 0, `top_p` 1 and `min_p` 0 (off), and random draws from `seed` 0.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt. `text` leaves out special tokens, such as the one that ends
    `tokens`. It took `rounds` calls of the target. Of the draft's proposals `tested` were compared
    with the target, up to the first rejected one of each round, and `accepted` were kept.
    """

    text: str
    tokens: list[int]
    rounds: int
    tested: int
    accepted: int


class Decoder:
    """Answers prompts with `target`, faster where a `draft` proposes `num_draft_tokens` tokens a
    round (4 by default). The draft changes no probability: greedy text is the target's own.

    A prompt is a text or a list of messages {"role": ..., "content": ...} that ends with the
    user's. Where the tokenizer has a chat template, a text is one user message; where it has none,
    the target continues the text. Up to `batch_size` prompts are decoded together.

    Raises:
        ModelError: a draft that does not fit the target.
        InputError: numbers out of range, here or in a call; a prompt that cannot be read or served.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel | None = None,
        *,
        num_draft_tokens: int | None = None,
        batch_size: int = 8,
    ) -> None:
        drafter = None
        if draft is not None:
            check_pair(target, draft)
            drafter = drafter_for(draft, target.vocab_size)
            num_draft_tokens = NUM_DRAFT_TOKENS if num_draft_tokens is None else num_draft_tokens
        self.target = target
        self.engine = SpeculativeDecoder(
            target, drafter, num_draft_tokens=num_draft_tokens or 0, batch_size=batch_size
        )

    @overload
    def generate(self, prompt: str | Messages, **settings: Unpack[Settings]) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str] | list[Messages], **settings: Unpack[Settings]
    ) -> list[Completion]: ...

    def generate(
        self, prompt: str | Messages | list[str] | list[Messages], **settings: Any
    ) -> Completion | list[Completion]:
        """The answer to one prompt, or the answers to several, see `Settings`."""
        several = isinstance(prompt, list) and not any(isinstance(part, Mapping) for part in prompt)
        prompts = cast("list[str | Messages]", prompt if several else [prompt])
        requests = self._requests(prompts, **settings)
        answers = [
            Completion(
                "".join(self._pieces(request, (round_.tokens for round_ in output.rounds))),
                output.tokens,
                len(output.rounds),
                sum(round_.tested for round_ in output.rounds),
                sum(round_.accepted for round_ in output.rounds),
            )
            for request, output in zip(requests, self.engine.run(requests).outputs, strict=True)
        ]
        return answers if several else answers[0]

    def stream(self, prompt: str | Messages, **settings: Unpack[Settings]) -> Iterator[str]:
        """The text of `generate` in pieces as they are decoded, without splitting a character."""
        (request,) = self._requests([prompt], **settings)
        rounds = self.engine.stream([request])
        return self._pieces(request, (round_.rows[0].tokens for round_ in rounds))

    def _requests(
        self,
        prompts: Sequence[str | Messages],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> list[Request]:
        limits.check("max_new_tokens", max_new_tokens, limits.NEW_TOKENS)
        limits.check("seed", seed, limits.SEED)
        sampling = Sampling(temperature, top_k, top_p, min_p)
        return [
            Request(str(number), self._encode(prompt, number), max_new_tokens, sampling, seed)
            for number, prompt in enumerate(prompts, 1)
        ]

    def _encode(self, asked: str | Messages, number: int) -> list[int]:
        prompt = as_prompt(asked, number)
        if prompt.response is not None:
            raise InputError(
                f"prompt {number} ends with an assistant message; end with the user's, which the "
                "target answers"
            )
        return encode_prompt(self.target.tokenizer, prompt)

    def _pieces(self, request: Request, rounds: Iterator[list[int]]) -> Iterator[str]:
        """The text of one answer's tokens, as it stands after its prompt."""
        tokenizer = self.target.tokenizer
        text = Detokenizer(tokenizer, after=request.tokens, skip_special_tokens=True)
        yield from filter(None, map(text.add, rounds))
        yield from filter(None, [text.end()])
