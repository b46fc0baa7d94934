"""What drafting the answers saves, measured: the same requests with the draft and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from specdistill.decoding import Generation, ModelDrafter, Request, SpeculativeDecoder
from specdistill.models import LanguageModel

TOKENS = 32  # of each answer, to measure a draft beforehand
PLAIN_TOKENS = 8  # of each answer, to tell what plain decoding takes


@dataclass(frozen=True)
class Gain:
    """Tokens per second without and with the draft, over `prompts` answers of at most `TOKENS`
    tokens; tokens_per_call is the mean a row emits in a round of the drafted ones.
    """

    prompts: int
    plain: float
    drafted: float
    tokens_per_call: float

    @property
    def ratio(self) -> float:
        """Above 1 the draft pays."""
        return self.drafted / self.plain


def measure_gain(
    target: LanguageModel,
    draft: LanguageModel,
    num_draft_tokens: int,
    requests: Sequence[Request],
    batch_size: int,
) -> Gain:
    """Decode one batch of the requests without the draft, with it, with it and without it, so that
    a machine that slows down favours neither. Nothing of it is kept, the caches neither.
    """
    plain = SpeculativeDecoder(target, batch_size=batch_size)
    drafted = SpeculativeDecoder(
        target,
        ModelDrafter(draft, target.vocab_size),
        num_draft_tokens=num_draft_tokens,
        batch_size=batch_size,
    )
    batch = [
        replace(r, max_new_tokens=min(r.max_new_tokens, TOKENS)) for r in requests[:batch_size]
    ]
    for decoder in (plain, drafted):  # what a first run has to set up
        decoder.run([replace(request, max_new_tokens=2) for request in batch])
    seconds, tokens = {plain: 0.0, drafted: 0.0}, {plain: 0, drafted: 0}
    rounds = 0
    for decoder in (plain, drafted, drafted, plain):
        start = perf_counter()
        outputs = decoder.run(batch).outputs
        seconds[decoder] += perf_counter() - start
        tokens[decoder] += sum(len(output.tokens) for output in outputs)
        rounds += sum(len(output.rounds) for output in outputs) if decoder is drafted else 0
    return Gain(
        len(batch),
        tokens[plain] / seconds[plain],
        tokens[drafted] / seconds[drafted],
        tokens[drafted] / rounds,
    )


@dataclass(frozen=True)
class Timed:
    """Drafted answers: the seconds they took, with those of finding out `plain_seconds`, about what
    they would have taken without the draft; tokens_per_call is the mean a row emits in a round.
    """

    generation: Generation
    tokens: int
    tokens_per_call: float
    seconds: float
    plain_seconds: float


def decode_timed(decoder: SpeculativeDecoder, requests: Sequence[Request]) -> Timed:
    """Run a decoder that drafts, after `PLAIN_TOKENS` of plain decoding of its first batch, which
    tell what a prompt and a token take without the draft. That batch is full, where a token takes
    the least, so that what is saved is rather more than less.
    """
    plain = SpeculativeDecoder(decoder.target, batch_size=decoder.batch_size)
    first = requests[: decoder.batch_size]
    probe = plain.run([replace(r, max_new_tokens=PLAIN_TOKENS) for r in first])
    prompts, probed = probe.seconds["prefill"], sum(probe.seconds.values())
    token = (probed - prompts) / _count(probe)
    generation = decoder.run(requests)
    tokens, seconds = _count(generation), probed + sum(generation.seconds.values())
    rounds = sum(len(output.rounds) for output in generation.outputs)
    plain_seconds = prompts * len(requests) / len(first) + token * tokens
    return Timed(generation, tokens, tokens / rounds, seconds, plain_seconds)


def _count(generation: Generation) -> int:
    return sum(len(output.tokens) for output in generation.outputs)
