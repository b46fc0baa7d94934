"""Speculative decoding: propose, verify, rewind, for a batch of rows that each keep their own pace.

Plain decoding is the same loop with no drafter. `_Stream.round` is the whole algorithm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import KW_ONLY, dataclass, field

import torch

from specdistill.decoding.cache import CachedModel, cache_bytes, pass_bytes
from specdistill.decoding.captured import CapturedStream, Workspace
from specdistill.decoding.drafters import Context, Draft, Drafter, ModelDrafter
from specdistill.decoding.graphs import CannotCaptureError, Graphs, warn_of_eager_rounds
from specdistill.decoding.records import CacheSize, Generation, Output, Request, Round
from specdistill.decoding.row import Row
from specdistill.decoding.sampling import GREEDY, Sampling, row_seed, row_settings
from specdistill.decoding.watch import Watch
from specdistill.errors import InputError
from specdistill.limits import MAX_DRAFT_TOKENS
from specdistill.models import LanguageModel, check_tokens
from specdistill.models.packing import pack, packing_bytes
from specdistill_kernels import Lenience, Mode, Verdict, verify

COARSE = 256  # slots: where graphs are kept, longer requests seldom need new ones
CAPTURING = "cuda"  # devices on which rounds are captured where a decoder says nothing of it


@dataclass(frozen=True, eq=False)
class SpeculativeDecoder:
    """Decodes requests with `target`, and with `drafter` proposing at most `num_draft_tokens` a
    round where one is given. These are settings: each stream has rows and caches of its own.

    `mode` "block" verifies whole blocks (2403.10444): the same distribution, and at temperatures
    above 0 on average at least as many accepted tokens. `lenience` accepts more and is LOSSY.
    On CUDA rounds are captured whole in graphs where that is possible; where it is not, they run
    eagerly, with the same tokens, and that is said once. What is captured, and the caches it knows,
    are kept from stream to stream while the weights are the same. With `cuda_graphs` False nothing
    is captured, with True at least the target's passes. `timed` tells where a round's time goes.
    `rule` takes the place of `verify`, for texts that are not meant to be the target's.
    """

    target: LanguageModel
    drafter: Drafter | None = None
    _: KW_ONLY
    num_draft_tokens: int = 0
    batch_size: int = 1
    keep_hidden: bool = False
    keep_proposals: bool = False
    rule: Callable[..., Verdict] | None = None
    mode: Mode = "token"
    lenience: Lenience | None = None
    cuda_graphs: bool | None = None
    timed: bool = True
    _spaces: list[Workspace] = field(default_factory=list, init=False, repr=False)
    _failures: list[str] = field(default_factory=list, init=False, repr=False)  # of captures

    def __post_init__(self) -> None:
        num, mode, lenience = self.num_draft_tokens, self.mode, self.lenience
        if (self.drafter is None) != (num == 0):
            raise InputError(
                f"num_draft_tokens is {num}: 0 exactly for plain decoding without a drafter"
            )
        if not 0 <= num <= MAX_DRAFT_TOKENS:
            raise InputError(f"num_draft_tokens must be 1 to {MAX_DRAFT_TOKENS}; got {num}")
        if self.drafter is None and (mode != "token" or lenience is not None):
            raise InputError("plain decoding verifies nothing: mode and lenience need a drafter")
        if mode not in ("token", "block"):
            raise InputError(f"mode must be 'token' or 'block'; got {mode!r}")
        if lenience is not None:
            kind, epsilon = lenience
            if mode != "token":
                raise InputError(f"lenience is a rule for single tokens; got mode {mode!r}")
            if kind not in ("lin", "sq", "exp") or not 0 < epsilon <= 1:
                raise InputError(
                    f"lenience must be lin, sq or exp with 0 < epsilon <= 1; got {kind} with "
                    f"{epsilon}"
                )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {self.batch_size}")

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
        draft_steps = captures = 0
        for round_ in self.stream(requests):
            for row in round_.rows:
                outputs[row.request_id].tokens += row.tokens
                outputs[row.request_id].rounds.append(row)
            for part, spent in round_.seconds.items():
                seconds[part] = seconds.get(part, 0.0) + spent
            by_round.append(round_.seconds)
            draft_steps += round_.draft_steps
            captures += round_.captures
        answers = [outputs[r.id] for r in requests]
        return Generation(
            answers, seconds, len(by_round), draft_steps, self.lenience, by_round, captures
        )

    def stream(self, requests: Iterable[Request]) -> Iterator[Round]:
        """Rounds as they happen. A finished row is replaced by a waiting request; when none waits,
        rows leave.

        Raises `InputError` for requests that cannot be served, before any work, and `DecodingError`
        where the target's logits hold no distribution.
        """
        requests = list(requests)
        self.check(requests)
        return self._rounds(requests)

    @torch.inference_mode()
    def _rounds(self, requests: Sequence[Request]) -> Iterator[Round]:
        if not requests:
            return
        rows = [Row(request, list(request.tokens)) for request in requests]
        graphs = None
        if self._captures:
            if hindrance := self._hindrance():
                warn_of_eager_rounds(hindrance)
                # Of the target's passes.
                graphs = Graphs(self.target.device) if self.cuda_graphs else None
            else:
                rows = yield from self._captured_rounds(rows)
        if rows:
            stream = _Stream(self, rows, graphs)
            while stream.is_open():
                yield stream.round()

    @property
    def _captures(self) -> bool:
        chosen = self.cuda_graphs
        return self.target.device.type == CAPTURING if chosen is None else chosen

    def _captured_rounds(self, rows: list[Row]) -> Generator[Round, None, list[Row]]:
        """Returns the rows that are left where a round could not be captured."""
        width, capacity = self._width(rows), self._capacity(row.request for row in rows)
        at = next((i for i, s in enumerate(self._spaces) if s.serves(width, capacity)), None)
        if at is None:
            self._spaces.clear()  # what no stream has taken, or two would be in memory
            drafter = self.drafter if isinstance(self.drafter, ModelDrafter) else None
            space = Workspace(self, drafter, width, capacity)
        else:
            space = self._spaces.pop(at)
            space.reset(width)
        stream = CapturedStream(space, rows)
        try:
            yield from stream.rounds()
        except CannotCaptureError as error:
            self._failures.append(str(error))  # later streams do not try
            self._spaces.clear()
            warn_of_eager_rounds(str(error))
            return stream.unfinished()
        finally:
            if not self._failures:
                self._spaces.append(space)
        return []

    def _hindrance(self) -> str:
        """Why rounds cannot be captured, as far as is known; empty if they can."""
        if self._failures:
            return self._failures[0]
        if self.rule is not None:
            return "a rule takes the place of `verify`"
        if self.drafter is None:
            return ""
        if not isinstance(self.drafter, ModelDrafter):
            return f"{type(self.drafter).__name__} proposes by what the host knows of texts"
        return self.drafter.hindrance

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `InputError` for requests that cannot be served."""
        for request in requests:
            self._check(request)
        if len({request.id for request in requests}) != len(requests):
            raise InputError("request ids must be distinct: they seed the rows")

    def cache_size(self, requests: Sequence[Request]) -> CacheSize:
        """What `stream` will allocate for these requests, before it does. Raises as `check`."""
        self.check(requests)
        rows, slots = self._width(requests), self._capacity(requests)
        total, models = cache_bytes(self.target, rows, slots), [self.target]
        if self.drafter is not None:
            total += self.drafter.cache_bytes(rows, slots)
            models += [model for model in self.drafter.models if model is not self.target]
        passes = max(pass_bytes(model, rows, slots) for model in models)
        return CacheSize(total, rows, slots, passes, sum(map(packing_bytes, models)))

    def _width(self, requests: Sized) -> int:
        return min(self.batch_size, len(requests))

    def _capacity(self, requests: Iterable[Request]) -> int:
        """Slots a row needs: the longest request, and a round's proposals beyond its end."""
        slots = max(len(r.tokens) + r.max_new_tokens for r in requests) + self.num_draft_tokens + 1
        return -(-slots // COARSE) * COARSE if self._captures else slots

    def _check(self, request: Request) -> None:
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
                f"{request.max_new_tokens} new ones exceed the {self.target.max_length} positions "
                f"of {self.target.name}; shorten the prompt or ask for fewer new tokens"
            )
        if self.lenience is not None and request.sampling.temperature == 0:
            raise InputError(
                f"request {request.id}: lenience has no effect at temperature 0, where the target "
                "gives its own token probability 1; raise the temperature or drop the lenience"
            )


class _Stream:
    """The rows of one call of `stream`: those that wait, and those under way with their caches. A
    row is None while no request is in it.
    """

    def __init__(
        self, decoder: SpeculativeDecoder, rows: Sequence[Row], graphs: Graphs | None = None
    ) -> None:
        self.decoder = decoder
        self.target = decoder.target
        self.eos_ids = self.target.eos_ids
        self.waiting = deque(rows)
        width, capacity = decoder._width(rows), decoder._capacity(row.request for row in rows)
        self.rows: list[Row | None] = [None] * width
        pack(self.target, width * (decoder.num_draft_tokens + 1))
        self.cached = CachedModel(self.target, width, capacity, graphs)
        self.drafts = None if decoder.drafter is None else decoder.drafter.open(width, capacity)

    def is_open(self) -> bool:
        return bool(self.waiting) or any(self.rows)

    def round(self) -> Round:
        """Admit, propose, verify, advance. A row that needs only m more tokens proposes at most
        m - 1.
        """
        watch = Watch(self.target.device)
        self._admit()
        watch.mark("prefill")

        context = self._context()
        wanted = [
            0 if row is None else row.wanted(self.decoder.num_draft_tokens) for row in self.rows
        ]
        if self.drafts is not None and max(wanted):
            draft = self.drafts.propose(context, max(wanted))
        else:
            nothing = torch.empty(len(wanted), 0, dtype=torch.int64, device=self.target.device)
            draft = Draft(nothing, [0] * len(wanted))
        num = draft.tokens.shape[1]
        counts = [min(pair) for pair in zip(wanted, draft.counts, strict=True)]
        watch.mark("draft")

        last, start = context.tail(1)
        tokens = torch.cat([last, draft.tokens.clamp(min=0)], 1)
        positions = start + torch.arange(num + 1, device=tokens.device)
        hidden = self.cached.run(tokens, positions, context.longest + num + 1)
        logits = self.cached.logits(hidden)
        watch.mark("target")

        verdict = (self.decoder.rule or verify)(
            draft.tokens,
            draft.logits,
            logits,
            context.settings,
            lengths=torch.tensor(counts, device=tokens.device),
            draft_vocab=draft.vocab,
            draft_lse=draft.logsumexp,
            point_mass=draft.point_mass,
            mode=self.decoder.mode,
            lenience=self.decoder.lenience,
        )
        emitted, accepted = verdict.tokens.tolist(), verdict.num_accepted.tolist()
        watch.mark("verify")

        logsumexp = logits.logsumexp(-1) if self.decoder.keep_hidden else None
        proposals = draft.tokens.tolist() if self.decoder.keep_proposals else None
        rows = []
        for i, row in enumerate(self.rows):
            if row is not None:
                out = row.advance(
                    emitted[i][: accepted[i] + 1], counts[i], accepted[i], self.eos_ids
                )
                if logsumexp is not None:
                    out.hidden = hidden[i, : len(out.tokens)].clone()
                    out.logsumexp = logsumexp[i, : len(out.tokens)].clone()
                if proposals is not None:
                    out.proposals = proposals[i][: counts[i]]
                if out.finished:
                    self.rows[i] = None
                rows.append(out)
        watch.mark("other")
        seconds = watch.seconds() if self.decoder.timed else {}
        return Round(rows, seconds, draft.steps)

    def _admit(self) -> None:
        """Fill free rows from the queue; drop free rows for good when nobody waits and they are a
        quarter of the batch.
        """
        free = [i for i, row in enumerate(self.rows) if row is None]
        if free and self.waiting:
            new = free[: len(self.waiting)]
            admitted = [self.waiting.popleft() for _ in new]
            for i, row in zip(new, admitted, strict=True):
                self.rows[i] = row
            prompts = [row.tokens[:-1] for row in admitted]
            rows = torch.tensor(new, device=self.target.device)
            self.cached.prefill(rows, prompts)
            if self.drafts is not None:
                self.drafts.prefill(rows, prompts)
        elif free and len(free) * 4 >= len(self.rows):
            taken = [i for i, row in enumerate(self.rows) if row is not None]
            self.rows = [self.rows[i] for i in taken]
            self.cached.keep(taken)
            if self.drafts is not None:
                self.drafts.keep(taken)
        else:
            return
        requests = [None if row is None else row.request for row in self.rows]
        self.settings = row_settings(
            [Sampling() if r is None else r.sampling for r in requests],
            [0 if r is None else row_seed(r.seed, r.id) for r in requests],
            self.target.device,
        )

    def _context(self) -> Context:
        """The batch as the drafter sees it. A row without a request computes nothing of use, in
        slots that will be overwritten.
        """
        tokens = [[0] if row is None else row.tokens for row in self.rows]
        lengths = [len(row) - 1 for row in tokens]
        steps = [0 if row is None else row.steps for row in self.rows]
        device = self.target.device
        return Context(
            tokens,
            torch.tensor(lengths, device=device),
            max(lengths),
            self.settings._replace(step=torch.tensor(steps, device=device)),
        )
