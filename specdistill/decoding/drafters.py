"""What proposes tokens: a small model, a look-up in the text so far, or both. A drafter is
settings; what it knows of a stream's rows is in the `DraftStream` that it opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from specdistill import limits
from specdistill.decoding.cache import CachedModel, cache_bytes
from specdistill.decoding.graphs import Graphs
from specdistill.decoding.rounds import Filters, Proposals, RowState
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.packing import pack
from specdistill_kernels import RowSettings, sample


@dataclass
class Context:
    """What the B rows of a batch hold at the start of a round. `tokens` are the rows' prompts and
    answers so far; `lengths` [B] and `longest`, their maximum on the host, leave out each last
    token, which no cache holds yet. `settings` are those of this round.
    """

    tokens: list[list[int]]
    lengths: Tensor
    longest: int
    settings: RowSettings

    def tail(self, width: int) -> tuple[Tensor, Tensor]:
        """Each row's last `width` tokens and their positions, both [B, width]. A shorter row
        repeats its first token at position 0, which writes the same values again.
        """
        device = self.lengths.device
        tail = [[row[max(i, 0)] for i in range(len(row) - width, len(row))] for row in self.tokens]
        offsets = torch.arange(1 - width, 1, device=device)
        return torch.tensor(tail, device=device), (self.lengths[:, None] + offsets).clamp(min=0)


@dataclass
class Draft:
    """tokens [B, G] in target ids, -1 after a row's `counts` [B] proposals (host), and what they
    were drawn from under the rows' sampling settings: raw logits [B, G, Vd] with `logsumexp` [B, G]
    as `sample` gave it, or certainty in the rows with `point_mass` [B], all of them where logits is
    None. `vocab` [Vd] gives the target ids of the logits where they do not cover the target's
    vocabulary one to one. `steps` counts the passes of a draft model.
    """

    tokens: Tensor
    counts: list[int]
    logits: Tensor | None = None
    logsumexp: Tensor | None = None
    vocab: Tensor | None = None
    point_mass: Tensor | None = None
    steps: int = 0


class DraftStream(Protocol):
    """What a drafter keeps of the rows of one stream."""

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        """New requests in some rows: all their tokens but the last."""

    def propose(self, context: Context, num_tokens: int) -> Draft:
        """At most `num_tokens` proposals a row. Whether a row goes on may depend on what it has
        drawn so far, but a token once drawn must be proposed: dropping it would bias the output.
        """
        ...

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these, renumbered in this order."""


class Drafter(Protocol):
    @property
    def models(self) -> Sequence[LanguageModel]:
        """Those that draft."""
        ...

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """What `open` allocates."""
        ...

    def open(self, batch: int, capacity: int) -> DraftStream:
        """Room for `batch` rows of up to `capacity` tokens."""
        ...


class ModelDrafter:
    """A small language model of the target's tokenizer, with a cache of its own.

    With `least_reach`, a row stops drawing once the chance that all it has drawn is accepted, taken
    to be the product of the draft's own probabilities (unfiltered; at temperature 0 those of
    temperature 1), falls below it. A further token costs a draft step and is worth that chance of a
    token: 1.5 times the time of a draft step over that of a plain target step is a good value. The
    rule needs no training and changes no distribution; on a GPU it waits for each token.
    `cuda_graphs` replays its passes where rounds are not captured as a whole.
    """

    def __init__(
        self,
        draft: LanguageModel,
        target_vocab_size: int,
        *,
        least_reach: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        limits.check("least_reach", least_reach, limits.LEAST_REACH)
        self.draft = draft
        self.least_reach = least_reach
        self.cuda_graphs = cuda_graphs
        self.width = draft.vocab_size
        self.vocab = draft.vocab
        if draft.vocab is None and draft.vocab_size > target_vocab_size:
            self.width = target_vocab_size  # rows that pad the draft's embedding
        elif draft.vocab is None and draft.vocab_size < target_vocab_size:
            # Rows beyond pad the target's.
            self.vocab = torch.arange(draft.vocab_size, device=draft.device)

    def readable(self, tokens: Tensor) -> Tensor:
        """Target ids as the draft reads them. An id that only pads the target's embedding may be
        sampled, and the draft may lack it; what it reads instead changes q alone, never the output.
        """
        return tokens.clamp(max=self.draft.full_vocab_size - 1)

    def columns(self, logits: Tensor) -> Tensor:
        """Of the draft's logits [..., Vd] those of tokens that the target has."""
        return logits[..., : self.width]

    def ids(self, tokens: Tensor) -> Tensor:
        """Of tokens as `columns` has them, the target's ids."""
        return tokens if self.vocab is None else self.vocab[tokens]

    @property
    def models(self) -> Sequence[LanguageModel]:
        return [self.draft]

    def cache_bytes(self, batch: int, capacity: int) -> int:
        return cache_bytes(self.draft, batch, capacity)

    def open(self, batch: int, capacity: int) -> ModelStream:
        return ModelStream(self, batch, capacity, self.graphs())

    def graphs(self) -> Graphs | None:
        """Of its passes in one stream, where they are to be captured."""
        return Graphs(self.draft.device) if self.cuda_graphs else None

    @property
    def hindrance(self) -> str:
        """Why its rounds cannot be captured; empty if they can."""
        return "least_reach looks at each token before the next" if self.least_reach else ""

    def open_captured(self, batch: int, capacity: int) -> ModelStream:
        return ModelStream(self, batch, capacity)


class ModelStream:
    """A draft model's cache, and how many tokens at the start of each row it holds (`known`)."""

    def __init__(
        self, drafter: ModelDrafter, batch: int, capacity: int, graphs: Graphs | None = None
    ) -> None:
        self.drafter = drafter
        pack(drafter.draft, 2 * batch)  # a round's first pass reads two tokens a row
        self.cached = CachedModel(drafter.draft, batch, capacity, graphs)
        self.known = [0] * batch

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        most = self.drafter.draft.full_vocab_size - 1
        self.cached.prefill(rows, [[min(token, most) for token in p] for p in prompts])
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self.known[row] = len(prompt)

    def keep(self, rows: list[int]) -> None:
        self.cached.keep(rows)
        self.known = [self.known[row] for row in rows]

    def compact(self, rows: list[int]) -> None:
        """As `keep`, in the same memory, for captured rounds."""
        self.cached.compact(rows)

    def reset(self, batch: int) -> None:
        """So many rows of those there were at first, for new requests."""
        self.cached.reset(batch)

    def passes(self, num_tokens: int) -> int:
        """Passes of the model that a round takes."""
        return num_tokens

    def draft_round(
        self, state: RowState, filters: Filters, num_tokens: int, visible: int
    ) -> Proposals:
        """`num_tokens` proposals a row by what the device knows of the rows, in a function of
        tensors that can be captured: nothing in it depends on a tensor's values. `visible` slots
        are above every position. The first pass takes each row's last two tokens, see `propose`.
        """
        drafter, settings = self.drafter, state.settings(filters)
        places = torch.arange(-1, num_tokens, device=state.tail.device) + state.lengths[:, None]
        inputs, positions = state.tail[:, -2:], places[:, :2].clamp(min=0)
        tokens, all_logits, logsumexp = [], [], []
        for i in range(num_tokens):
            hidden = self.cached.run(drafter.readable(inputs), positions, visible)[:, -1]
            logits = drafter.columns(self.cached.logits(hidden))
            drawn = sample(logits, settings, position=i)
            tokens.append(drafter.ids(drawn.tokens))
            all_logits.append(logits)
            logsumexp.append(drawn.logsumexp)
            inputs, positions = tokens[-1][:, None], places[:, i + 2 : i + 3]
        return Proposals(
            torch.stack(tokens, 1),
            torch.stack(all_logits, 1),
            torch.stack(logsumexp, 1),
            drafter.vocab,
        )

    def rewind(self, context: Context) -> None:
        """Forget the last proposals but for the accepted ones; a row's last token is none."""
        lengths = [len(row) - 1 for row in context.tokens]
        self.known = [min(pair) for pair in zip(self.known, lengths, strict=True)]

    def propose(self, context: Context, num_tokens: int) -> Draft:
        """The first pass takes what the cache lacks of each row, at least two tokens: after a
        fully accepted round that is the last accepted token and the bonus token, so that rounds
        have the same shape. What a shorter row reads again writes the same values.
        """
        drafter = self.drafter
        self.rewind(context)
        missing = [len(row) - known for row, known in zip(context.tokens, self.known, strict=True)]
        inputs, positions = context.tail(max(2, *missing))
        reach = torch.ones(len(context.tokens), dtype=torch.float64, device=inputs.device)
        counts, going = [0] * len(context.tokens), [True] * len(context.tokens)
        tokens, all_logits, logsumexp = [], [], []
        for i in range(num_tokens):
            if not any(going):
                break
            counts = [count + goes_on for count, goes_on in zip(counts, going, strict=True)]
            readable = drafter.readable(inputs)
            hidden = self.cached.run(readable, positions, context.longest + i + 1)[:, -1]
            logits = drafter.columns(self.cached.logits(hidden))
            drawn = sample(logits, context.settings, position=i)
            tokens.append(drafter.ids(drawn.tokens))
            all_logits.append(logits)
            logsumexp.append(drawn.logsumexp)
            inputs, positions = tokens[-1][:, None], context.lengths[:, None] + i + 1
            if drafter.least_reach and i + 1 < num_tokens:
                reach = reach * _chances(logits, drawn.tokens, context.settings.temperature)
                going = (reach >= drafter.least_reach).tolist()
        steps = len(tokens)
        self.known = [len(row) + steps - 1 for row in context.tokens]  # if all are accepted
        return Draft(
            torch.stack(tokens, 1),
            counts,
            torch.stack(all_logits, 1),
            torch.stack(logsumexp, 1),
            drafter.vocab,
            steps=steps,
        )


def _chances(logits: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
    """The probability [B] of each row's token by its logits [B, Vd], without filters."""
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None]
    return (logits / scale).softmax(-1).gather(-1, tokens[:, None])[:, 0]


class NgramDrafter:
    """Prompt look-up: where the last tokens of a text occurred before, propose what followed then
    (the latest place of the longest match of `longest` to `shortest` tokens). Costs no model, and
    pays where answers repeat their prompts.
    """

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise InputError(
                f"an n-gram drafter needs 1 <= shortest <= longest; got {shortest} and {longest}"
            )
        self.sizes = range(longest, shortest - 1, -1)

    @property
    def models(self) -> Sequence[LanguageModel]:
        return []

    def cache_bytes(self, batch: int, capacity: int) -> int:
        return 0

    def open(self, batch: int, capacity: int) -> NgramStream:
        return NgramStream(self.sizes, batch)


class NgramStream:
    """Where the n-grams of each row occurred."""

    def __init__(self, sizes: Sequence[int], batch: int) -> None:
        self.sizes = sizes
        self.seen = [_NgramIndex(sizes) for _ in range(batch)]

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        for row in rows.tolist():
            self.seen[row] = _NgramIndex(self.sizes)

    def keep(self, rows: list[int]) -> None:
        self.seen = [self.seen[row] for row in rows]

    def look_up(self, context: Context, num_tokens: int) -> list[list[int]]:
        """Up to `num_tokens` proposals for each row; none where nothing matches."""
        return [
            index.follow(tokens, num_tokens)
            for index, tokens in zip(self.seen, context.tokens, strict=True)
        ]

    def propose(self, context: Context, num_tokens: int) -> Draft:
        return _certain(self.look_up(context, num_tokens), context.lengths.device)


class CombinedDrafter:
    """Prompt look-up where it finds a match, the model in the other rows."""

    def __init__(self, ngram: NgramDrafter, model: ModelDrafter) -> None:
        self.ngram = ngram
        self.model = model

    @property
    def models(self) -> Sequence[LanguageModel]:
        return self.model.models

    def cache_bytes(self, batch: int, capacity: int) -> int:
        return self.model.cache_bytes(batch, capacity)

    def open(self, batch: int, capacity: int) -> CombinedStream:
        return CombinedStream(self.ngram.open(batch, capacity), self.model.open(batch, capacity))


class CombinedStream:
    def __init__(self, ngram: NgramStream, model: ModelStream) -> None:
        self.ngram = ngram
        self.model = model

    def prefill(self, rows: Tensor, prompts: list[list[int]]) -> None:
        self.ngram.prefill(rows, prompts)
        self.model.prefill(rows, prompts)

    def keep(self, rows: list[int]) -> None:
        self.ngram.keep(rows)
        self.model.keep(rows)

    def propose(self, context: Context, num_tokens: int) -> Draft:
        """Where every row matches, the model does not run; it reads later what it missed."""
        self.model.rewind(context)
        matches = self.ngram.look_up(context, num_tokens)
        if all(matches):
            return _certain(matches, context.lengths.device)
        draft = self.model.propose(context, num_tokens)
        if any(matches):
            _replace(draft, matches)
        for row, tokens in enumerate(matches):
            if tokens:  # what the model drew there was not proposed
                self.model.known[row] = len(context.tokens[row])
        return draft


def _replace(draft: Draft, matches: list[list[int]]) -> None:
    """Proposals made with certainty in the place of those drawn, in the rows that have some."""
    more = max(map(len, matches)) - draft.tokens.shape[1]
    if more > 0 and draft.logits is not None and draft.logsumexp is not None:
        draft.tokens = functional.pad(draft.tokens, (0, more), value=-1)
        draft.logits = functional.pad(draft.logits, (0, 0, 0, more))
        draft.logsumexp = functional.pad(draft.logsumexp, (0, more))
    width = draft.tokens.shape[1]
    for row, tokens in enumerate(matches):
        if tokens:
            padded = tokens + [-1] * (width - len(tokens))
            draft.tokens[row] = torch.tensor(padded, device=draft.tokens.device)
            draft.counts[row] = len(tokens)
    draft.point_mass = torch.tensor([bool(match) for match in matches], device=draft.tokens.device)


class _NgramIndex:
    """The latest place after each n-gram of one growing row; each token is read once."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.places: dict[tuple[int, ...], int] = {}
        self.read = 0

    def follow(self, tokens: list[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the latest earlier occurrence of the row's end."""
        for end in range(self.read + 1, len(tokens)):  # n-grams that something follows
            for size in self.sizes:
                if size <= end:
                    self.places[tuple(tokens[end - size : end])] = end
        self.read = max(len(tokens) - 1, 0)
        for size in self.sizes:
            place = self.places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                return tokens[place : place + count]
        return []


def _certain(rows: list[list[int]], device: torch.device) -> Draft:
    """Proposals made with certainty."""
    counts = [len(row) for row in rows]
    width = max(counts)
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return Draft(torch.tensor(padded, dtype=torch.int64, device=device), counts)
