"""Speculative decoding: propose, verify, rewind, for a batch of rows that each keep their own pace.

Plain decoding is the same loop with no drafter. `_round` is the whole algorithm.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise

import torch

from specdistill.decoding.cache import CachedModel, cache_bytes
from specdistill.decoding.drafters import Draft, Drafter, RoundState
from specdistill.decoding.graphs import Graphs
from specdistill.decoding.records import (
    CacheSize,
    Generation,
    Output,
    Request,
    Round,
    RowRound,
)
from specdistill.decoding.sampling import GREEDY, Sampling, SamplingBatch, row_seed
from specdistill.errors import DecodingError, InputError
from specdistill.limits import MAX_DRAFT_TOKENS
from specdistill.models import LanguageModel, check_tokens
from specdistill_kernels import Lenience, Mode, Verdict, verify


@dataclass
class _Row:
    request: Request
    tokens: list[int]  # prompt and answer so far; all but the last are in the caches
    emitted: int = 0
    steps: int = 0


class SpeculativeDecoder:
    """Decodes requests with `target`, and with `drafter` proposing at most `num_draft_tokens` a
    round where one is given.

    `mode` "block" verifies whole blocks (2403.10444): the same distribution, and at temperatures
    above 0 on average at least as many accepted tokens. `lenience` accepts more and is LOSSY.
    `cuda_graphs` replays the target's passes from captured graphs; a drafter has its own switch.
    `rule` takes the place of `verify`, for texts that are not meant to be the target's.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafter: Drafter | None = None,
        *,
        num_draft_tokens: int = 0,
        batch_size: int = 1,
        keep_hidden: bool = False,
        keep_proposals: bool = False,
        rule: Callable[..., Verdict] | None = None,
        mode: Mode = "token",
        lenience: Lenience | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if (drafter is None) != (num_draft_tokens == 0):
            raise InputError(
                f"num_draft_tokens is {num_draft_tokens}: 0 exactly for plain decoding without "
                "a drafter"
            )
        if not 0 <= num_draft_tokens <= MAX_DRAFT_TOKENS:
            raise InputError(
                f"num_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}; got {num_draft_tokens}"
            )
        if drafter is None and (mode != "token" or lenience is not None):
            raise InputError("plain decoding verifies nothing: mode and lenience need a drafter")
        if mode not in ("token", "block"):
            raise InputError(f"mode must be 'token' or 'block'; got {mode!r}")
        if lenience is not None and mode != "token":
            raise InputError(f"lenience is a rule for single tokens; got mode {mode!r}")
        if lenience is not None and not (
            lenience.kind in ("lin", "sq", "exp") and 0 < lenience.epsilon <= 1
        ):
            raise InputError(
                f"lenience must be lin, sq or exp with 0 < epsilon <= 1; got {lenience.kind} with "
                f"{lenience.epsilon}"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {batch_size}")
        self.target = target
        self.drafter = drafter
        self.num_draft_tokens = num_draft_tokens
        self.batch_size = batch_size
        self.keep_hidden = keep_hidden
        self.keep_proposals = keep_proposals
        self.rule = rule
        self.mode = mode
        self.lenience = lenience
        self.cuda_graphs = cuda_graphs

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Generation:
        """Answer token prompts, all with the same settings; row i has request id str(i)."""
        return self.run(
            [Request(str(i), p, max_new_tokens, sampling, seed) for i, p in enumerate(prompts)]
        )

    def run(self, requests: Sequence[Request]) -> Generation:
        """Answer requests and gather the rounds by request."""
        outputs = {request.id: Output(request.id) for request in requests}
        seconds: dict[str, float] = {}
        by_round: list[dict[str, float]] = []
        draft_steps = 0
        for round_ in self.stream(requests):
            for row in round_.rows:
                outputs[row.request_id].tokens += row.tokens
                outputs[row.request_id].rounds.append(row)
            for part, spent in round_.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + spent
            by_round.append(round_.seconds)
            draft_steps += round_.draft_steps
        answers = [outputs[r.id] for r in requests]
        return Generation(answers, seconds, len(by_round), draft_steps, self.lenience, by_round)

    @torch.inference_mode()
    def stream(self, requests: Iterable[Request]) -> Iterator[Round]:
        """Yield rounds as they happen. A finished row is replaced by a waiting request; when none
        waits, rows leave. A decoder has one stream at a time: a new one ends the last.

        Raises `InputError` for a request that cannot be served, before any work, and
        `DecodingError` where the target's logits hold no distribution, or another stream of this
        decoder has begun.
        """
        self._waiting = waiting = deque(requests)
        for request in waiting:
            self._check(request)
        if len({request.id for request in waiting}) != len(waiting):
            raise InputError("request ids must be distinct: they seed the rows")
        if not waiting:
            return
        self._eos_ids = self.target.eos_ids
        capacity = self._capacity(waiting)
        self._rows: list[_Row | None] = [None] * self._width(waiting)
        graphs = Graphs() if self.cuda_graphs else None
        vars(self).pop("_cached", None)  # an earlier stream's slots go before new ones are taken
        self._cached = CachedModel(self.target, len(self._rows), capacity, graphs)
        if self.drafter is not None:
            self.drafter.open(len(self._rows), capacity)
        while waiting or any(self._rows):
            start = time.perf_counter()
            self._admit(waiting)
            self._prefill_seconds = self._clock() - start
            yield self._round()
            if self._waiting is not waiting:
                raise DecodingError(
                    "another stream of this decoder has begun, which ends this one; give each "
                    "stream a decoder and a drafter of its own"
                )

    def cache_size(self, requests: Sequence[Request]) -> CacheSize:
        """What `stream` will allocate for these requests, before it does. Raises `InputError` for a
        request that cannot be served.
        """
        for request in requests:
            self._check_size(request)
        rows, slots = self._width(requests), self._capacity(requests)
        total = cache_bytes(self.target, rows, slots)
        if self.drafter is not None:
            total += self.drafter.cache_bytes(rows, slots)
        return CacheSize(total, rows, slots)

    def _width(self, requests: Sized) -> int:
        return min(self.batch_size, len(requests))

    def _capacity(self, requests: Iterable[Request]) -> int:
        """Slots a row needs: the longest request, and a round's proposals beyond its end."""
        return max(len(r.tokens) + r.max_new_tokens for r in requests) + self.num_draft_tokens + 1

    def _check(self, request: Request) -> None:
        self._check_size(request)
        if self.lenience is not None and request.sampling.temperature == 0:
            raise InputError(
                f"request {request.id}: lenience has no effect at temperature 0, where the target "
                "gives its own token probability 1; raise the temperature or drop the lenience"
            )

    def _check_size(self, request: Request) -> None:
        if not request.tokens:
            raise InputError(f"request {request.id}: the prompt has no tokens")
        check_tokens(self.target, request.tokens, f"request {request.id}: the prompt")
        if request.max_new_tokens < 1:
            raise InputError(
                f"request {request.id}: max_new_tokens must be at least 1; got "
                f"{request.max_new_tokens}"
            )
        total = len(request.tokens) + request.max_new_tokens
        if total > self.target.max_length:
            raise InputError(
                f"request {request.id}: {len(request.tokens)} prompt tokens + "
                f"{request.max_new_tokens} new ones exceed "
                f"the {self.target.max_length} positions of {self.target.name}; shorten the prompt "
                "or ask for fewer new tokens"
            )

    def _admit(self, waiting: deque[Request]) -> None:
        """Fill free rows from the queue; drop free rows for good when nobody waits and they are a
        quarter of the batch.
        """
        free = [i for i, row in enumerate(self._rows) if row is None]
        if free and waiting:
            new = free[: len(waiting)]
            for i in new:
                request = waiting.popleft()
                self._rows[i] = _Row(request, list(request.tokens))
            prompts = [self._row(i).tokens[:-1] for i in new]
            rows = torch.tensor(new, device=self.target.device)
            self._cached.prefill(rows, prompts)
            if self.drafter is not None:
                self.drafter.prefill(rows, prompts)
            self._sampling = self._settings()
        elif len(free) * 4 >= len(self._rows) and free:
            kept = [i for i, row in enumerate(self._rows) if row is not None]
            self._rows = [self._rows[i] for i in kept]
            self._cached.keep(kept)
            if self.drafter is not None:
                self.drafter.keep(kept)
            self._sampling = self._settings()

    def _settings(self) -> SamplingBatch:
        requests = [None if row is None else row.request for row in self._rows]
        return SamplingBatch.build(
            [Sampling() if r is None else r.sampling for r in requests],
            [0 if r is None else row_seed(r.seed, r.id) for r in requests],
            self.target.device,
        )

    def _row(self, index: int) -> _Row:
        row = self._rows[index]
        assert row is not None
        return row

    def _round(self) -> Round:
        """Propose, verify, advance. A row that needs only m more tokens proposes at most m - 1."""
        marks = [self._clock()]
        state = self._state()
        wanted = [0 if row is None else self._wanted(row) for row in self._rows]
        if self.drafter is not None and max(wanted):
            draft = self.drafter.propose(state, max(wanted))
        else:
            nothing = torch.empty(len(wanted), 0, dtype=torch.int64, device=self.target.device)
            draft = Draft(nothing, [0] * len(wanted))
        num = draft.tokens.shape[1]
        counts = [min(pair) for pair in zip(wanted, draft.counts, strict=True)]
        marks.append(self._clock())

        last, start = state.tail(1)
        tokens = torch.cat([last, draft.tokens.clamp(min=0)], 1)
        positions = start + torch.arange(num + 1, device=tokens.device)
        hidden = self._cached.run(tokens, positions, state.longest + num + 1)
        logits = self.target.logits(hidden)
        marks.append(self._clock())

        verdict = (self.rule or verify)(
            draft.tokens,
            draft.logits,
            logits,
            lengths=torch.tensor(counts, device=tokens.device),
            **self._sampling.arguments(),
            step=state.step,
            draft_vocab=draft.vocab,
            draft_lse=draft.logsumexp,
            point_mass=draft.point_mass,
            mode=self.mode,
            lenience=self.lenience,
        )
        emitted, accepted = verdict.tokens.tolist(), verdict.num_accepted.tolist()
        marks.append(self._clock())

        logsumexp = logits.logsumexp(-1) if self.keep_hidden else None
        proposals = draft.tokens.tolist() if self.keep_proposals else None
        rows = []
        for i, row in enumerate(self._rows):
            if row is not None:
                out = self._advance(row, emitted[i][: accepted[i] + 1], counts[i], accepted[i])
                if logsumexp is not None:
                    out.hidden = hidden[i, : len(out.tokens)].clone()
                    out.logsumexp = logsumexp[i, : len(out.tokens)].clone()
                if proposals is not None:
                    out.proposals = proposals[i][: counts[i]]
                if out.finished:
                    self._rows[i] = None
                rows.append(out)
        marks.append(self._clock())
        spent = [b - a for a, b in pairwise(marks)]
        seconds = dict(zip(("draft", "target", "verify", "other"), spent, strict=True))
        return Round(rows, {"prefill": self._prefill_seconds, **seconds}, draft.steps)

    def _state(self) -> RoundState:
        """The batch as the drafter sees it. A row that waits for nobody computes nothing of use, in
        slots that will be overwritten.
        """
        texts = [[0] if row is None else row.tokens for row in self._rows]
        lengths = [len(text) - 1 for text in texts]
        steps = [0 if row is None else row.steps for row in self._rows]
        device = self.target.device
        return RoundState(
            texts,
            torch.tensor(lengths, device=device),
            max(lengths),
            self._sampling,
            torch.tensor(steps, device=device),
        )

    def _wanted(self, row: _Row) -> int:
        return min(self.num_draft_tokens, row.request.max_new_tokens - row.emitted - 1)

    def _advance(self, row: _Row, tokens: list[int], proposed: int, accepted: int) -> RowRound:
        if tokens[-1] < 0:
            raise DecodingError(
                f"request {row.request.id}, round {row.steps}, new token "
                f"{row.emitted + accepted}: the target's logits are "
                "NaN or all -inf; check the checkpoint, or try dtype float32"
            )
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._eos_ids), None)
        tokens = tokens[:end]
        row.tokens += tokens
        row.emitted += len(tokens)
        row.steps += 1
        finished = end is not None or row.emitted >= row.request.max_new_tokens
        tested = min(accepted + 1, proposed, len(tokens))
        return RowRound(
            row.request.id, tokens, proposed, tested, min(accepted, len(tokens)), finished
        )

    def _clock(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
