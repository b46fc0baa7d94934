"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from specdistill.decoding.sampling import GREEDY, Sampling
from specdistill_kernels import Lenience, TargetTopK


@dataclass(frozen=True)
class Request:
    """One prompt in tokens. `id` seeds the row's draws: the same id and seed give the same text in
    any batch.
    """

    id: str
    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0


@dataclass
class RowRound:
    """What one round did to one row. `tokens` are the emitted ones, cut at the end of the answer;
    so are `accepted` and `tested` (proposals up to and including the first rejected one), not
    `proposed`. `hidden` [n, d] and `logsumexp` [n] belong to the positions that predicted `tokens`,
    and `proposals` are the draft's tokens, where the engine was asked to keep them. An outside
    engine may give the most probable tokens of these positions in place of states, with the sum
    of `signal.alpha_cost`, and the sum of the tokens' own log-probabilities.
    """

    request_id: str
    tokens: list[int]
    proposed: int
    tested: int
    accepted: int
    finished: bool
    hidden: Tensor | None = None
    logsumexp: Tensor | None = None
    proposals: list[int] | None = None
    top: TargetTopK | None = None
    alpha_cost: float = 0.0
    log_prob: float | None = None


@dataclass
class Round:
    """One target call for the whole batch; seconds by part: "prefill", "draft", "target", "verify",
    "other". A captured round verifies in the part "target". `captures` are the graphs that had to
    be captured for it.
    """

    rows: list[RowRound]
    seconds: dict[str, float]
    draft_steps: int
    captures: int = 0


@dataclass
class Output:
    """The answer to one request, with the rounds that made it."""

    request_id: str
    tokens: list[int] = field(default_factory=list)
    rounds: list[RowRound] = field(default_factory=list)


@dataclass
class Generation:
    """`lossy` is the lenience that changed the answers' distribution; None is exact.
    `round_seconds` are the rounds', which add up to `seconds`.
    """

    outputs: list[Output]  # in the order of the requests
    seconds: dict[str, float]
    rounds: int
    draft_steps: int
    lossy: Lenience | None = None
    round_seconds: list[dict[str, float]] = field(default_factory=list)
    captures: int = 0


class CacheSize(NamedTuple):
    """What the keys and values of target and draft take: `rows` of `slots` tokens each; and, about,
    what decoding takes beside them for its largest pass and for copies of the weights.
    """

    bytes: int
    rows: int
    slots: int
    passes: int
    weights: int

    @property
    def line(self) -> str:
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return (
            f"cache: {self.bytes / 1e6:,.1f} MB for {rows} of up to {self.slots:,} tokens; "
            f"about {self.passes / 1e6:,.1f} MB more for passes, {self.weights / 1e6:,.1f} MB for "
            "packed weights"
        )
