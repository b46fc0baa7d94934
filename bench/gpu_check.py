"""Kernels against the plain reference on this device, with fresh random inputs.

`verify` and `sample` must agree with the reference token for token. The two round differently, so
a decision that hangs on the last bits may fall either way: such a near-tie is a difference that the
reference itself shows in float64 once its inputs move by a rounding error. Near-ties are counted,
and more than a few are a failure; any other difference is one. Then chi-square tests on 16 tokens,
which need no reference at all, and the fused losses in value and gradient.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from bench.gpu_check_losses import check_losses
from bench.gpu_check_streams import check_streams
from bench.gpu_session import Session
from bench.gpu_timing import capture
from specdistill_kernels import Drawn, Lenience, Mode, RowSettings, Verdict, sample, verify

ROUNDING = 3e-5  # relative size of the movements that may explain a difference
TRIALS = 24
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Rows of a batch take turns through `temperatures` and the filters' values."""

    name: str
    temperatures: tuple[float, ...] = (1.0,)
    top_k: tuple[int, ...] | None = None
    top_p: tuple[float, ...] | None = None
    min_p: tuple[float, ...] | None = None
    mode: Mode = "token"
    lenience: Lenience | None = None
    draft: Literal["logits", "certain", "mixed"] = "logits"
    trimmed: bool = False
    stored_lse: bool = False
    ragged: bool = False
    bad_rows: bool = False
    coarse: bool = False  # logits full of exact ties
    strided: bool = False  # rows that are parts of wider ones
    batch: int = 16
    num: int = 5
    vocab: int = 151_936
    dtype: torch.dtype = torch.float32


MIXED = (0.0, 0.6, 1.0, 1.4)
FILTERS: Arguments = {
    "top_k": (0, 1, 7, 50),
    "top_p": (1.0, 0.95, 0.5, 0.8, 1.0),
    "min_p": (0.0, 0.05, 0.3),
}
FEATURES = (
    Case("one temperature"),
    Case("greedy", (0.0,)),
    Case("mixed temperatures", MIXED, ragged=True),
    Case("top-k", (0.7,), top_k=(0, 1, 7, 50)),
    Case("top-p", (0.7,), top_p=(1.0, 0.95, 0.5)),
    Case("min-p", (0.7,), min_p=(0.0, 0.05, 0.3)),
    Case("all filters", MIXED, **FILTERS),
    Case("block", (0.7, 1.0), mode="block", ragged=True),
    Case("block, all filters", MIXED, mode="block", **FILTERS),
    Case("certain draft", MIXED, draft="certain"),
    Case("certain draft, block", MIXED, draft="certain", mode="block", ragged=True),
    Case("certain in some rows", MIXED, draft="mixed", **FILTERS),
    Case("trimmed vocabulary", MIXED, trimmed=True),
    Case("trimmed vocabulary, block, all filters", MIXED, trimmed=True, mode="block", **FILTERS),
    Case("stored logsumexp", MIXED, stored_lse=True),
    Case("stored logsumexp, trimmed, all filters", MIXED, stored_lse=True, trimmed=True, **FILTERS),
    Case("bad rows", MIXED, bad_rows=True, ragged=True),
    Case("bad rows, block, all filters", MIXED, bad_rows=True, mode="block", **FILTERS),
    Case("ties", MIXED, coarse=True),
    Case("ties, all filters", MIXED, coarse=True, **FILTERS),
    Case("strided rows", MIXED, strided=True, stored_lse=True),
    Case("lenience", (0.7, 1.0), lenience=Lenience("lin", 0.5)),
    Case("one proposal", MIXED, num=1, **FILTERS),
    Case("eight proposals", MIXED, num=8, batch=5, ragged=True),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VOCABULARIES = (151_936, 4_097, 50)


def run(session: Session) -> None:
    """Every feature once at the widest vocabulary, then every loss, both in bfloat16; then replays
    and streams; the other dtypes and vocabularies as far as the time goes.
    """
    first, *others = grid(session)
    tokens(session, first, 0.35)
    check_losses(session, share=0.7, widest=True)
    for case in FEATURES[1::7]:
        if session.smoke:
            case = replace(case, batch=4, vocab=67)
        session.case(f"replayed: {label(case)}", partial(check_replay, session, case))
    check_streams(session, share=0.8)
    for cases in others:
        tokens(session, cases, 0.9)
    check_losses(session, widest=False)


def grid(session: Session) -> list[list[Case]]:
    """All features at one vocabulary and dtype after the other, the widest first."""
    if session.smoke:
        features = FEATURES[::4] if session.interpreted else FEATURES
        return [[replace(case, batch=4, vocab=67) for case in features]]
    return [
        [replace(case, vocab=vocab, dtype=dtype) for case in FEATURES]
        for vocab, dtype in product(VOCABULARIES, DTYPES)
    ]


def tokens(session: Session, cases: list[Case], share: float) -> None:
    for case in cases:
        session.case(label(case), partial(check_tokens, session, case), share=share)


def check_tokens(session: Session, case: Case) -> None:
    """The proposals are drawn by `sample`, which is checked first; then `verify` on them."""
    arguments, drawn = build(session, case)
    rows = ties = 0
    wrong: list[Arguments] = []
    calls: list[tuple[Any, Arguments]] = [(sample, one) for one in drawn]
    for call, each in [*calls, (verify, arguments)]:
        ours = call(**each, backend=session.backend)
        theirs = call(**each, backend="reference")
        if isinstance(ours, Drawn):
            close = torch.isclose(ours.logsumexp, theirs.logsumexp, 1e-4, 1e-4, equal_nan=True)
            bad = ~(close | ~theirs.logsumexp.isfinite())
            wrong += [_row("logsumexp", i, ours[1][i], theirs[1][i]) for i in _places(bad)]
        mine, right = decisions(ours), decisions(theirs)
        rows += len(mine)
        for i in _places((mine != right).any(-1)):
            if is_near_tie(session, call, _take(each, i), mine[i]):
                ties += 1
            else:
                wrong.append(_row(call.__name__, i, mine[i], right[i]))
    passed = not wrong and ties <= 1 + rows // 200
    session.check(label(case), passed, rows=rows, near_ties=ties, wrong=wrong[:3])


def check_replay(session: Session, case: Case) -> None:
    """A captured `verify` answers new inputs as a fresh call does, each time it is replayed."""
    arguments, _ = build(session, case)
    results: list[Verdict] = []
    replay = capture(lambda: results.append(verify(**arguments, backend=session.backend)))
    same = []
    for _ in range(3):
        arguments["rows"].step.add_(1)
        arguments["target_logits"].copy_(arguments["target_logits"].flip(0))
        replay()
        fresh = verify(**arguments, backend=session.backend)
        same.append(torch.equal(decisions(results[-1]), decisions(fresh)))
    session.check(f"replayed: {label(case)}", all(same), same=same)


def label(case: Case) -> str:
    return f"{case.name}, {str(case.dtype).removeprefix('torch.')}, V={case.vocab}"


def build(session: Session, case: Case) -> tuple[Arguments, list[Arguments]]:
    """The arguments of `verify`, and those of each call of `sample` that led to them."""
    batch, num, vocab = case.batch, case.num, case.vocab
    device = session.device

    def in_turn(values: tuple[float, ...] | None, dtype: torch.dtype) -> Tensor | None:
        if values is None:
            return None
        index = torch.arange(batch, device=device) % len(values)
        return torch.tensor(values, dtype=dtype, device=device)[index]

    temperature = in_turn(case.temperatures, torch.float64)
    assert temperature is not None
    rows = RowSettings(
        temperature,
        session.integers(2**62, batch),
        session.integers(1000, batch),
        in_turn(case.top_k, torch.int64),
        in_turn(case.top_p, torch.float64),
        in_turn(case.min_p, torch.float64),
    )
    kept = torch.arange(vocab, device=device)
    if case.trimmed:
        kept = session.uniform(vocab).topk(max(2, vocab // 3)).indices.sort().values
    target = 3 * session.normal(batch, num + 1, vocab + 16 * case.strided)
    draft = target[:, :num, :vocab][..., kept] + 0.7 * session.normal(batch, num, len(kept))
    if case.coarse:
        target, draft = target.round(), draft.round()
    target, draft = target.to(case.dtype)[..., :vocab], draft.to(case.dtype)
    if case.bad_rows:
        target[0, 0], target[1, -1], target[2, 1 % num, 0] = torch.nan, -torch.inf, torch.inf
        target[3, :, ::2] = -torch.inf
        draft[1, 0], draft[2, -1, 0] = torch.nan, torch.inf
        draft[3, 0] = -torch.inf

    drawn = [{"logits": draft[:, i], "position": i, "rows": rows} for i in range(num)]
    proposals = [sample(**each, backend=session.backend) for each in drawn]
    tokens = kept[torch.stack([p.tokens for p in proposals], 1)]
    lengths = torch.full((batch,), num, device=device)
    if case.ragged:
        lengths = session.integers(num + 1, batch)
        tokens[-1, num // 2 :] = -1
    arguments: Arguments = {
        "draft_tokens": tokens,
        "draft_logits": draft,
        "target_logits": target,
        "rows": rows,
    }
    arguments |= {"lengths": lengths, "mode": case.mode, "lenience": case.lenience}
    if case.trimmed and case.draft != "certain":
        arguments["draft_vocab"] = kept
    if case.stored_lse:
        arguments["draft_lse"] = torch.stack([p.logsumexp for p in proposals], 1)
    if case.draft == "certain":
        arguments["draft_logits"], drawn = None, []
    if case.draft == "mixed":
        arguments["point_mass"] = session.integers(2, batch).bool()
    return arguments, drawn


def decisions(result: Drawn | Verdict) -> Tensor:
    """What two backends must agree on: [B, 1] tokens drawn, or [B, G+2] tokens and their number."""
    if isinstance(result, Drawn):
        return result.tokens[:, None]
    return torch.cat([result.tokens, result.num_accepted[:, None]], 1)


def is_near_tie(session: Session, call: Any, row: Arguments, ours: Tensor) -> bool:
    """Whether the reference in float64 decides about one row as we did, once its inputs move by
    rounding errors. ours: our `decisions`.

    Equal logits are moved alike, so that a wrong rule for ties explains nothing. At temperature 0
    nothing is rounded and nothing is explained.
    """
    if float(row["rows"].temperature) == 0:
        return False

    def nudged_share(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return torch.where(value < 1, value * (1 + ROUNDING * float(session.normal(1))), value)

    def moved(name: str, value: Any) -> Any:
        if isinstance(value, RowSettings):
            top_p, min_p = nudged_share(value.top_p), nudged_share(value.min_p)
            return value._replace(top_p=top_p, min_p=min_p)
        if not name.endswith("logits") or value is None:
            return value
        wide = value.double()
        phase = 2 * torch.pi * session.uniform(*wide.shape[:-1], 1)
        nudged = wide + ROUNDING * torch.sin(1e9 * wide + phase)  # a hash of the logit
        return torch.where(wide.isfinite(), nudged, wide)

    for _ in range(TRIALS):
        trial = {name: moved(name, value) for name, value in row.items()}
        if torch.equal(decisions(call(**trial, backend="reference"))[0], ours):
            return True
    return False


def _take(arguments: Arguments, i: int) -> Arguments:
    """The arguments of one row."""
    one = slice(i, i + 1)
    alone = {
        name: value[one] if isinstance(value, Tensor) and name != "draft_vocab" else value
        for name, value in arguments.items()
    }
    return alone | {"rows": arguments["rows"].of(one)}


def _places(where: Tensor) -> list[int]:
    return where.nonzero()[:, 0].tolist()


def _row(what: str, row: int, ours: Tensor, theirs: Tensor) -> Arguments:
    return {"what": what, "row": row, "ours": ours.tolist(), "reference": theirs.tolist()}
