"""The Triton backend against the reference, token for token, under Triton's interpreter."""

import importlib
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "interpreted kernels need TRITON_INTERPRET=1 before triton is imported: "
        "TRITON_INTERPRET=1 python -m pytest tests/test_verify_triton.py",
        allow_module_level=True,
    )
pytest.importorskip("triton")

import numpy as np
import torch
import triton
import triton.language as tl
from scipy import stats

import specdistill_kernels
from specdistill_kernels import (
    Lenience,
    RowSettings,
    counter_noise,
    probabilities,
    sample_places,
)
from specdistill_kernels.tiles import Tile
from specdistill_kernels.verification import triton_backend
from specdistill_kernels.verification import triton_noise as noise
from specdistill_kernels.verification.launch import Division, Launcher
from specdistill_kernels.verification.noise import COIN, FINAL, coin, exponential

# Of NaN and infinite logits, which the kernels meet and set aside.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def by_name(op: Callable) -> Callable:
    """The op, with each of `RowSettings` as an argument of its own, for tests that change one."""

    def call(*arguments, **named):
        rows = {name: named.pop(name, None) for name in RowSettings._fields}
        return op(*arguments, rows=RowSettings(**rows), **named)

    return call


sample, verify = by_name(specdistill_kernels.sample), by_name(specdistill_kernels.verify)
triton_sample, triton_verify = by_name(triton_backend.sample), by_name(triton_backend.verify)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(
    batch: int = 64,
    num: int = 3,
    width: int = 100,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    apart: float = 1.0,
    vocab: int = 0,
    **rows,
) -> dict:
    """Arguments of `verify`: drafts that lie `apart` from the target (negative: opposite to it),
    trimmed to `vocab` tokens, with proposals drawn from them. `rows` overrides or adds settings."""
    torch.manual_seed(seed)
    target = (torch.randn(batch, num + 1, width) * 2).to(dtype)
    draft = target[:, :num].float() + apart * torch.randn(batch, num, width)
    draft = (-target[:, :num].float() if apart < 0 else draft).to(dtype)
    chosen = torch.randperm(width)[:vocab].sort().values if vocab else None
    draft = draft[..., chosen].contiguous() if vocab else draft
    settings = {
        "temperature": torch.ones(batch),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,)),
        "step": torch.randint(0, 2**33, (batch,)),
    }
    settings |= {k: v for k, v in rows.items() if k in ("temperature", "top_k", "top_p", "min_p")}
    drawn = [sample(draft[:, i], position=i, backend="reference", **settings) for i in range(num)]
    tokens = torch.stack([d.tokens for d in drawn], 1) if num else torch.empty(batch, 0).long()
    return {
        "draft_tokens": tokens if chosen is None else chosen[tokens],
        "draft_logits": draft,
        "target_logits": target,
        "lengths": torch.full((batch,), num),
        "draft_vocab": chosen,
        **settings,
        **{k: v for k, v in rows.items() if k != "vocab"},
    }


def near_tie(arguments: dict, b: int, mine, theirs) -> bool:
    """Whether request b was decided by less than rounding, in mode "token"."""
    filters = {k: arguments.get(k) for k in ("temperature", "top_k", "top_p", "min_p")}
    filters = {k: None if v is None else v[b : b + 1] for k, v in filters.items()}
    i = int(min(mine.num_accepted[b], theirs.num_accepted[b]))
    p = probabilities(arguments["target_logits"][b : b + 1, i].double(), **filters)[0]
    rejected = i < arguments["lengths"][b]
    q = torch.zeros_like(p)
    if rejected:
        q = probabilities(arguments["draft_logits"][b : b + 1, i].double(), **filters)[0]
    stream = [arguments[k][b : b + 1] for k in ("seeds", "step")] + [torch.tensor([i])]
    if mine.num_accepted[b] != theirs.num_accepted[b]:
        x = arguments["draft_tokens"][b, i]
        u = coin(counter_noise(*stream, COIN, torch.zeros(1).long()))[0, 0]
        return bool((u * q[x] - p[x]).abs() < 1e-6 * p[x])
    e = exponential(counter_noise(*stream, FINAL, torch.arange(len(p))))[0].double()
    x, y = mine.tokens[b, i], theirs.tokens[b, i]
    score = (p - q).clamp(min=0) / e
    return bool((score[x] - score[y]).abs() < 1e-6 * (p[x] / e[x] + p[y] / e[y]))


def assert_equal(arguments: dict, division: Division | None = None) -> None:
    """Kernel and reference give the same verdicts, all of them."""
    theirs = verify(**arguments, backend="reference")
    if division is None:
        mine = verify(**arguments, backend="triton")
    else:
        mine = triton_verify(**defaults(arguments), division=division)
    assert mine.tokens.dtype == mine.num_accepted.dtype == torch.int64
    different = (mine.tokens != theirs.tokens).any(-1).nonzero()[:, 0].tolist()
    assert not different, f"{len(different)} of {len(mine.tokens)} requests differ"
    assert torch.equal(mine.num_accepted, theirs.num_accepted)


def cut_up(part: int, race: int = 0, tally: int = 0, positions: int = 4, **more: int) -> Division:
    """Of a row into parts of so many tokens, and otherwise as said."""
    tiles = [Tile(block or part, 4) for block in (part, race, tally, tally)]
    usual = {"least_parts": 1, "rounds": 2, "programs": 8}
    return Division(*tiles, positions=positions, **usual | more)


def defaults(arguments: dict) -> dict:
    names = ("draft_vocab", "draft_lse", "point_mass", "lenience")
    return {**dict.fromkeys(names), "mode": "token", **arguments}


# Noise.


@triton.jit
def _noise_kernel(seeds, steps, bits, exponentials, R: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, R)[:, None]
    token = tl.arange(0, N)[None, :]
    seed = tl.load(seeds + row)
    shift, key = noise.stream(seed, tl.load(steps + row), row * 3, noise.FINAL)
    found = noise.random_bits(shift, key, token)
    tl.store(bits + row * N + token, found.to(tl.int64))
    tl.store(exponentials + row * N + token, noise.exponential(found))


@triton.jit
def _exponential_kernel(bits, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, noise.exponential(tl.load(bits + at).to(tl.uint32)))


def test_exponentials_at_the_ends_and_at_powers_of_two() -> None:
    powers = 2 ** torch.arange(32)
    bits = torch.cat([powers, 2**32 - powers])  # the last is 2**32 - 1
    mine = torch.empty(64)
    _exponential_kernel[(1,)](bits, mine, N=64)
    assert mine.isfinite().all()
    torch.testing.assert_close(mine * math.log(2), exponential(bits), rtol=2**-21, atol=0)


def test_noise_is_the_references_bit_for_bit() -> None:
    torch.manual_seed(0)
    rows, width = 16, 2**15
    seeds, steps = torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.randint(0, 2**40, (rows,))
    bits, e = torch.empty(rows, width, dtype=torch.int64), torch.empty(rows, width)
    _noise_kernel[(1,)](seeds, steps, bits, e, R=rows, N=width)
    tokens, positions = torch.arange(width), torch.arange(rows) * 3
    assert torch.equal(bits, counter_noise(seeds, steps, positions, FINAL, tokens))
    u = ((bits.float() + 0.5) * 2**-32).clamp(max=1 - 2**-24).double()
    exact = -torch.log1p(-u) / math.log(2)
    assert ((e - exact) / exact).abs().max() < 2**-21  # 4 ulp
    assert (e > 0).all()


# Token for token.


def combination(seed: int) -> dict:
    """A random mixture of everything `verify` takes, per row where it can be."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    batch, num = 48, pick.choice([1, 2, 3, 5])
    width = pick.choice([7, 33, 64, 160, 500])
    rows: dict = {"temperature": torch.tensor([0.0, 0.6, 1.0, 1.7])[torch.randint(4, (batch,))]}
    if pick.random() < 0.5:
        rows["top_k"] = torch.tensor([0, 1, 4, 30, 10_000])[torch.randint(5, (batch,))]
    if pick.random() < 0.5:
        rows["top_p"] = torch.tensor([1.0, 0.9, 0.5, 1e-6])[torch.randint(4, (batch,))]
    if pick.random() < 0.3:
        rows["min_p"] = torch.tensor([0.0, 0.02, 0.3])[torch.randint(3, (batch,))]
    arguments = problem(
        batch,
        num,
        width,
        seed=seed,
        dtype=pick.choice([torch.float32, torch.bfloat16, torch.float16]),
        apart=pick.choice([0.2, 1.0, -1.0]),
        vocab=pick.choice([0, 0, (width + 1) // 2]),
        **rows,
    )
    arguments["lengths"] = torch.randint(0, num + 2, (batch,))
    arguments["mode"] = pick.choice(["token", "block"])
    tokens = arguments["draft_tokens"]
    tokens[torch.rand(tokens.shape) < 0.05] = -1
    kind = pick.choice(["logits", "lse", "some certain", "all certain"])
    if kind == "lse":
        warm = torch.where(rows["temperature"] > 0, rows["temperature"], 1.0)
        scaled = arguments["draft_logits"].float() / warm[:, None, None]
        arguments["draft_lse"] = torch.logsumexp(scaled, -1)
    elif kind == "some certain":
        arguments["point_mass"] = torch.rand(batch) < 0.5
    elif kind == "all certain":
        arguments["draft_logits"] = arguments["draft_vocab"] = None
    if arguments["mode"] == "token" and pick.random() < 0.4:
        arguments["lenience"] = Lenience(pick.choice(["lin", "sq", "exp"]), 0.6)
    return arguments


@pytest.mark.parametrize("seed", range(24))
def test_any_combination_equals_the_reference(seed: int) -> None:
    assert_equal(combination(seed))


@pytest.mark.parametrize("mode", ["token", "block"])
def test_many_requests_equal_the_reference(mode: str) -> None:
    assert_equal(problem(4000, 3, 60, apart=0.7, mode=mode))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": torch.full((64,), 9)}, {"top_p": torch.full((64,), 0.7)}],
    ids=["plain", "top_k", "top_p"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sampling_equals_the_reference(dtype: torch.dtype, settings: dict) -> None:
    arguments = problem(64, 0, 300, dtype=dtype, **settings)
    arguments["temperature"] = torch.tensor([0.0, 0.3, 1.0, 2.0]).repeat(16)
    logits = arguments["target_logits"][:, 0]
    logits[3, 5], logits[7], logits[11] = torch.nan, -torch.inf, torch.nan
    logits[4, 1], logits[8] = torch.nan, torch.nan  # in greedy rows
    rows = {k: arguments[k] for k in ("temperature", "seeds", "step", *settings)}
    mine = sample(logits, position=2, backend="triton", **rows)
    theirs = sample(logits, position=2, backend="reference", **rows)
    assert torch.equal(mine.tokens, theirs.tokens)
    assert mine.logsumexp.dtype == torch.float32
    torch.testing.assert_close(
        mine.logsumexp, theirs.logsumexp, rtol=1e-6, atol=2e-6, equal_nan=True
    )


@pytest.mark.parametrize("division", [None, cut_up(64, race=32, tally=32)], ids=["", "as on a GPU"])
@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
def test_all_places_at_once_are_drawn_as_each_alone(
    filtered: bool, division: Division | None
) -> None:
    batch, places = (8, 3) if division is None else (3, 2)
    logits = torch.randn(batch, places, 90, generator=torch.Generator().manual_seed(4)) * 2
    filters = {"top_k": torch.arange(batch), "min_p": torch.full((batch,), 0.1)} if filtered else {}
    stream = (torch.arange(batch) * 7, torch.arange(batch))
    rows = RowSettings(torch.tensor([0.0, 0.5, 1.0]).repeat(3)[:batch], *stream, **filters)
    mine = triton_backend.sample_places(logits, rows, division=division)
    theirs = sample_places(logits, rows, backend="reference")
    assert torch.equal(mine.tokens, theirs.tokens)
    torch.testing.assert_close(mine.logsumexp, theirs.logsumexp, rtol=1e-6, atol=2e-6)


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the documentation says, whatever the settings of the rows."""
    names: list[str] = []
    launch = Launcher.__call__

    def counted(self, kernel, *arguments, **more):
        names.append(kernel.__name__)
        launch(self, kernel, *arguments, **more)

    monkeypatch.setattr(Launcher, "__call__", counted)
    arguments = problem(4, 2, 30, temperature=torch.tensor([0.0, 1.0, 0.7, 0.0]))
    logits, places = arguments["target_logits"][:, 0], arguments["target_logits"]
    rows = RowSettings(*(arguments[name] for name in ("temperature", "seeds", "step")))
    for draw in (
        lambda: specdistill_kernels.sample(logits, rows, position=0, backend="triton"),
        lambda: sample_places(places, rows, backend="triton"),
    ):
        names.clear()
        draw()
        assert names == ["sample_kernel"]
    names.clear()
    verify(**arguments, backend="triton")
    assert names == ["stats_kernel", "decide_kernel", "race_kernel"]
    names.clear()
    verify(**arguments, mode="block", top_p=torch.full((4,), 0.9), backend="triton")
    filters = ["tally_kernel"] * 2 + ["cut_kernel"]  # four times on a GPU
    assert names == ["stats_kernel", *filters, "excess_kernel", "decide_kernel", "race_kernel"]


def test_what_is_sampled_is_what_is_verified() -> None:
    """A draft equal to its target, drawn by the kernel, stands whole."""
    arguments = problem(256, 3, 90, apart=0.0)
    rows = {k: arguments[k] for k in ("temperature", "seeds", "step")}
    drawn = [
        sample(arguments["draft_logits"][:, i], position=i, backend="triton", **rows)
        for i in range(3)
    ]
    arguments["draft_tokens"] = torch.stack([d.tokens for d in drawn], 1)
    for mode in ("token", "block"):
        assert (verify(**arguments, mode=mode, backend="triton").num_accepted == 3).all()


def test_a_difference_is_a_near_tie() -> None:
    """Logits of log E make all tokens tie in the race up to rounding: kernel and reference differ
    there, and nowhere else. So `near_tie` can fail, and what other tests find equal is no tie."""
    arguments = problem(512, 0, 50)
    stream = (arguments["seeds"], arguments["step"], torch.zeros(512, dtype=torch.int64))
    e = exponential(counter_noise(*stream, FINAL, torch.arange(50)))
    arguments["target_logits"] = e.log()[:, None]
    mine, theirs = (verify(**arguments, backend=name) for name in ("triton", "reference"))
    different = (mine.tokens != theirs.tokens).any(-1).nonzero()[:, 0].tolist()
    assert different
    assert all(near_tie(arguments, b, mine, theirs) for b in different)
    arguments["target_logits"] = torch.randn(512, 1, 50)
    elsewhere = verify(**arguments, backend="reference")
    moved = theirs.tokens.clone()
    moved[:, 0] = (elsewhere.tokens[:, 0] + 1) % 50
    assert not any(
        near_tie(arguments, b, elsewhere._replace(tokens=moved), elsewhere) for b in range(64)
    )


# Distributions.


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("apart", [0.5, -1.0], ids=["near", "opposite"])
def test_emitted_tokens_follow_the_target(apart: float, mode: str) -> None:
    batch, num = 20_000, 2
    one = problem(1, num, 16, apart=apart, seed=5)
    draft = one["draft_logits"].expand(batch, -1, -1)
    target = one["target_logits"].expand(batch, -1, -1)
    rows = {
        "temperature": torch.ones(batch),
        "seeds": torch.arange(batch),
        "step": torch.zeros(batch, dtype=torch.int64),
    }
    drawn = [sample(draft[:, i], position=i, backend="triton", **rows).tokens for i in range(num)]
    out = verify(
        torch.stack(drawn, 1),
        draft,
        target,
        lengths=torch.full((batch,), num),
        mode=mode,
        backend="triton",
        **rows,
    )
    p = one["target_logits"][0].double().softmax(-1)
    q = one["draft_logits"][0].double().softmax(-1)
    assert stats.chisquare(torch.bincount(drawn[0], minlength=16), q[0] * batch).pvalue > 1e-4
    # Jointly, each row's stream continued from p where its round ended.
    more = torch.stack([torch.multinomial(row, batch, replacement=True) for row in p], 1)
    stream = torch.where(out.tokens >= 0, out.tokens, more)
    expected = (p[0][:, None, None] * p[1][:, None] * p[2]).flatten() * batch
    counts = torch.bincount((stream * torch.tensor([256, 16, 1])).sum(-1), minlength=16**3)
    rare = expected < 5
    merged = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected)]
    assert stats.chisquare(*merged).pvalue > 1e-4
    if mode == "token":
        overlap = torch.minimum(p[0], q[0]).sum().item()
        accepted = (out.num_accepted >= 1).double().mean().item()
        assert abs(accepted - overlap) < 5 * (overlap * (1 - overlap) / batch) ** 0.5


# Filters.


def kept_by_kernel(
    logits: torch.Tensor, filters: dict, division: Division | None = None
) -> torch.Tensor:
    """The set that the cut of each row keeps, read from the workspace."""
    found = {}
    original = triton_backend._launcher

    def remember(*arguments, **more):
        found["launch"] = original(*arguments, **more)
        return found["launch"]

    zeros = torch.zeros(len(logits), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "_launcher", remember)
        triton_sample(logits, seeds=zeros, step=zeros, position=0, division=division, **filters)
    cuts = found["launch"].arguments["cuts"][: len(logits)]
    return logits.float() >= cuts[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_p_and_min_p_keep_the_references_set(dtype: torch.dtype) -> None:
    """Up to a cumulative mass that meets top_p within rounding."""
    torch.manual_seed(2)
    logits = (torch.randn(96, 700) * 3).to(dtype)
    logits[:24] = logits[:24].round()
    filters = {
        "temperature": torch.tensor([0.4, 1.0, 1.9]).repeat(32),
        "top_k": torch.tensor([0, 30]).repeat(48),
        "top_p": torch.tensor([1.0, 0.99, 0.9, 0.5, 0.1, 1e-9, 0.0, 1.5]).repeat(12),
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.2, 1.0]).repeat(20)[:96],
    }
    kept = kept_by_kernel(logits, filters)
    p = probabilities(logits, **filters)
    different = ((p > 0) != kept).any(-1).nonzero()[:, 0]
    for b in different.tolist():
        at = {k: v[b : b + 1] for k, v in filters.items() if k in ("temperature", "top_k")}
        full = probabilities(logits[b : b + 1].double(), **at)[0]
        least = min(full[kept[b]].min(), full[p[b] > 0].min())
        before = full[full > least].sum()
        assert abs(before - filters["top_p"][b]) < 1e-6
    assert len(different) <= 1


def hard_rows(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Ties, a few equal numbers, all -inf but one, zeros of both signs, numbers that differ in
    their last bits alone; under filters at their ends and between, and at temperature 0."""
    torch.manual_seed(3)
    logits = torch.randn(64, 150) * 3
    logits[:16] = logits[:16].round()
    logits[16:20], logits[20:24, 1:], logits[24:28] = 1.5, -torch.inf, -0.0
    logits[24:28, ::3] = 0.0
    logits[28:36] = 8 + torch.randint(4, (8, 150)) * 2**-20  # these are equal in 16 bits
    logits[36:40, 20:] = -torch.inf
    filters = {
        "temperature": torch.tensor([0.7, 1.0, 1.9, 0.0])[torch.randint(4, (64,))],
        "top_k": torch.tensor([0, 1, 2, 40, 149, 150, 9999])[torch.randint(7, (64,))],
        "top_p": torch.tensor([1.0, 0.97, 0.6, 0.01, 0.0])[torch.randint(5, (64,))],
        "min_p": torch.tensor([0.0, 0.0, 0.05, 1.0])[torch.randint(4, (64,))],
    }
    return logits.to(dtype), filters


SPLITS = [
    cut_up(256, rows=64, filter_rows=64, tally=64, room=16, rounds=4, programs=2),
    cut_up(64, rows=64, filter_rows=64, tally=256, room=256),  # all is collected at once
    cut_up(256, rows=64, filter_rows=64, tally=256, room=0, rounds=3),  # and never
]


def check_cuts(dtypes: list[torch.dtype], splits: Sequence[Division | None]) -> None:
    for dtype, division in itertools.product(dtypes, splits):
        logits, filters = hard_rows(dtype)
        warm = filters["temperature"] > 0
        expected = probabilities(logits, **filters) > 0
        kept = kept_by_kernel(logits, filters, division) & (logits > -torch.inf)
        assert torch.equal(kept[warm], expected[warm]), division


@pytest.mark.parametrize(
    "division", [*SPLITS, None], ids=["by and by", "at once", "never", "as it comes"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_split_keeps_the_references_set(dtype: torch.dtype, division: Division | None) -> None:
    check_cuts([dtype], [division])


def test_a_row_and_a_program_as_on_a_gpu_keep_the_references_set() -> None:
    logits, filters = hard_rows(torch.float32)
    rows = torch.arange(0, 64, 9)
    logits, filters = logits[rows], {name: value[rows] for name, value in filters.items()}
    kept = kept_by_kernel(logits, filters, cut_up(64, room=16)) & (logits > -torch.inf)
    warm = filters["temperature"] > 0
    assert torch.equal(kept[warm], (probabilities(logits, **filters) > 0)[warm])


FILTER_MUTATIONS = {
    "a tie with a pivot is lost": ("x[:, None, :] >= pivots", "x[:, None, :] > pivots"),
    "what the bracket ends with is collected": ("(x < smallest", "(x <= smallest"),
    "the logits above those collected do not count": ("numbers + beyond", "numbers"),
    "the mass above those collected does not count": ("sums + mass_beyond", "sums"),
    "top-k collects up to its bracket": ("((phase == 0) | (x", "((phase < 0) | (x"),
    "top-p is forgotten after top-k": ("(p < 1.0) & (count", "(p < 0.0) & (count"),
    "top-p goes on in the bracket of top-k": (
        "onward, (HIGHEST >> SHIFT), high",
        "onward, high, high",
    ),
    "min-p is forgotten after top-p": ("wanted & (floor_key > low)", "wanted & (floor_key < low)"),
    "a bracket with two logits is narrow enough": ("count - above <= 1", "count - above <= 2"),
}


@pytest.mark.parametrize("name", FILTER_MUTATIONS)
def test_broken_filters_are_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = FILTER_MUTATIONS[name]
    package = "specdistill_kernels.verification"
    folder = Path(triton_backend.__file__).parent
    sources = {name: (folder / f"{name}.py").read_text() for name in ("search", "filter")}
    assert sum(source.count(old) for source in sources.values()) >= 1
    for module, source in sources.items():
        source = source.replace(old, new).replace(f"{package}.search", "broken_search")
        (tmp_path / f"broken_{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"broken_{module}", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    broken = importlib.import_module("broken_filter")
    for kernel in ("tally_kernel", "cut_kernel"):
        monkeypatch.setattr(triton_backend, kernel, getattr(broken, kernel))
    with pytest.raises(AssertionError, match="Division"):
        check_cuts([torch.bfloat16, torch.float32], SPLITS)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "min_p": 0.1}])
def test_filtered_tokens_follow_the_filtered_target(settings: dict[str, float]) -> None:
    batch = 5000
    one = problem(1, 1, 16, seed=6)
    draft, target = (one[name].expand(batch, -1, -1) for name in ("draft_logits", "target_logits"))
    filters = {name: torch.full((batch,), value) for name, value in settings.items()}
    rows = {"temperature": torch.full((batch,), 2.5), "seeds": torch.arange(batch), **filters}
    rows["step"] = torch.zeros(batch, dtype=torch.int64)
    drawn = sample(draft[:, 0], position=0, backend="triton", **rows).tokens[:, None]
    lengths = torch.ones(batch, dtype=torch.int64)
    out = verify(drawn, draft, target, lengths=lengths, backend="triton", **rows)
    settings_of_one = {name: value[:1] for name, value in filters.items()}
    p = probabilities(one["target_logits"][:, 0], rows["temperature"][:1], **settings_of_one)[0]
    counts = torch.bincount(out.tokens[:, 0], minlength=16)
    assert (p > 0).sum() in range(3, 16)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0].double() / p.double().sum() * batch
    assert stats.chisquare(counts[p > 0], expected).pvalue > 1e-4


def test_filtered_rows_without_a_distribution() -> None:
    arguments = problem(8, 1, 40, top_k=torch.full((8,), 5), top_p=torch.full((8,), 0.9))
    arguments["target_logits"][0, 0] = torch.nan
    arguments["target_logits"][1, 0] = -torch.inf
    arguments["draft_logits"][2, 0] = torch.nan
    arguments["draft_logits"][3, 0] = torch.inf
    assert_equal(arguments)
    out = verify(**arguments, backend="triton")
    assert out.tokens[:2].tolist() == [[-1, -1]] * 2
    assert (out.num_accepted[2:4] == 0).all()
    assert (out.tokens[2:4, 0] >= 0).all()


# Bad rows, odd shapes, layouts.


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("side", ["target_logits", "draft_logits"])
def test_bad_rows(side: str, mode: str) -> None:
    arguments = problem(60, 2, 37, mode=mode)
    arguments["temperature"] = torch.tensor([0.0, 1.0]).repeat(30)
    bad = [torch.nan, -torch.inf, torch.inf]
    for b in range(24):
        position = b // 2 % 2
        if b < 12:
            arguments[side][b, position] = bad[b % 3]
        else:
            arguments[side][b, position, b] = [torch.nan, torch.inf][b % 2]
    assert_equal(arguments)
    out = verify(**arguments, backend="triton")
    assert (out.tokens < 37).all()
    assert (out.tokens >= -1).all()
    if side == "draft_logits":
        assert (out.tokens[:, 0] >= 0).all()
    else:
        assert (out.tokens[:, 0] == -1).any()


def test_a_draft_that_lies_above_the_target_everywhere_leaves_the_target() -> None:
    """With a stored logsumexp that is a little small, no residual may be left; p is drawn from."""
    arguments = problem(64, 1, 8, apart=0.0)
    arguments["draft_lse"] = torch.logsumexp(arguments["draft_logits"], -1) - 0.2
    assert_equal(arguments)
    out = verify(**arguments, backend="triton")
    assert (out.num_accepted == 0).any()
    assert (out.tokens[:, 0] >= 0).all()


def test_a_coin_that_meets_p_is_a_rejection() -> None:
    """u q < p strictly: else a token of probability 0 would pass at a coin of 0."""
    seeds, zero = torch.arange(1000), torch.zeros(1, dtype=torch.int64)
    coins = coin(counter_noise(seeds, *zero.expand(2, 1000), COIN, zero))[:, 0]
    seed = int(((coins.float() == coins) & (coins > 0.2) & (coins < 0.8)).nonzero()[0])
    u = coins[seed]
    # Of the two logits (x, 0) the first has p near u; as the kernel computes it.
    x = np.float32(torch.logit(u)) + np.arange(-400, 400, dtype=np.float32) * np.float32(1e-8)
    x = x[x < 0] if u < 0.5 else x[x > 0]
    peak = np.maximum(x, np.float32(0))
    w, other = np.exp(x - peak), np.exp(-peak)
    p = torch.from_numpy(w * (np.float32(1) / (w + other)))
    assert (p.double() == u).any()
    batch = len(x)
    target = torch.zeros(batch, 2, 2)
    target[:, 0, 0] = torch.from_numpy(x)
    out = verify(
        torch.zeros(batch, 1, dtype=torch.int64),
        None,
        target,
        lengths=torch.ones(batch, dtype=torch.int64),
        temperature=torch.ones(batch),
        seeds=torch.full((batch,), seed),
        step=zero.expand(batch),
        backend="triton",
    )
    assert torch.equal(out.num_accepted == 1, u < p.double())


@pytest.mark.parametrize("mode", ["token", "block"])
def test_more_positions_than_are_looked_at_together(mode: str) -> None:
    arguments = problem(24, 5, 50, apart=0.15, mode=mode)
    arguments["lengths"][::5] = 4
    arguments["draft_tokens"][3, 3] = -1
    for positions in (2, 4):
        assert_equal(arguments, cut_up(64, rows=32, positions=positions))


def test_no_requests_no_proposals_and_one_token() -> None:
    arguments = problem(5, 2, 9)
    none = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert verify(**none, backend="triton").tokens.shape == (0, 3)
    assert_equal(problem(5, 0, 9))
    assert_equal(problem(5, 2, 1))
    assert_equal({**problem(5, 3, 9), "draft_logits": None, "mode": "block"})


def test_rows_of_any_stride() -> None:
    arguments = problem(16, 2, 64)
    whole = torch.randn(16, 5, 200)
    for start in (16, 3):  # aligned to 16 and not
        arguments["target_logits"] = whole[:, 1:4, start : start + 64]
        arguments["draft_logits"] = whole.flip(0)[:, 2:4, start : start + 64]
        assert_equal(arguments)
    arguments["target_logits"] = torch.randn(1, 3, 64).expand(16, -1, -1)
    assert_equal(arguments)


def test_other_integer_and_float_dtypes() -> None:
    arguments = problem(16, 2, 30, top_p=torch.full((16,), 0.8), top_k=torch.full((16,), 9))
    changed = dict(arguments)
    for name in ("lengths", "top_k", "step", "draft_tokens"):
        changed[name] = arguments[name].int() % 2**20
        arguments[name] = arguments[name] % 2**20
    for name in ("temperature", "top_p"):
        changed[name] = arguments[name].double()
    mine = verify(**changed, backend="triton")
    assert torch.equal(mine.tokens, verify(**arguments, backend="reference").tokens)


# How the work is cut up.

CUTS = [
    {},
    {"mode": "block"},
    {"temperature": torch.tensor([0.0, 1.0]).repeat(4)},
    {"top_k": torch.full((8,), 20), "top_p": torch.full((8,), 0.8)},
    {"min_p": torch.full((8,), 0.05)},
    {"vocab": 41},
]


@pytest.mark.parametrize("settings", CUTS, ids=lambda s: "-".join(s) or "token")
def test_results_do_not_depend_on_tiles_or_parts(settings: dict) -> None:
    arguments = problem(8, 3, 150, **settings)
    if "temperature" in settings:
        arguments["target_logits"] = arguments["target_logits"].round()  # the first of equals
    for division in (
        cut_up(64, tally=128, rows=16, filter_rows=64),
        cut_up(16, race=32, tally=64, rows=32, filter_rows=32, positions=2, room=5),
    ):
        assert_equal(arguments, division)


@pytest.mark.parametrize("settings", CUTS, ids=lambda s: "-".join(s) or "token")
def test_one_request_a_program_as_on_a_gpu(settings: dict) -> None:
    """Where a column is a scalar."""
    arguments = problem(8, 2, 30, **settings)
    arguments = {k: v[-2:] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if "vocab" in settings:
        arguments["draft_vocab"] = problem(8, 2, 30, **settings)["draft_vocab"]
    assert_equal(arguments, cut_up(16, race=32, tally=32, positions=2))


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "filtered"])
@pytest.mark.parametrize("mode", ["token", "block"])
def test_nothing_is_read_before_it_is_written(
    mode: str, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = {"top_p": torch.full((24,), 0.8)} if filtered else {}
    arguments = problem(24, 3, 150, mode=mode, vocab=30, **filters)
    arguments["temperature"] = torch.tensor([0.0, 1.0, 0.7]).repeat(8)
    arguments["lengths"] = torch.arange(24) % 4
    rows = {k: arguments[k] for k in ("temperature", "seeds", "step", *filters)}
    division = cut_up(32, tally=128, rows=64, filter_rows=128)
    theirs = sample(arguments["draft_logits"][:, 0], position=0, backend="reference", **rows)
    empty = torch.empty

    def poisoned(*arguments, **more):
        made = empty(*arguments, **more)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**31))

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_equal(arguments, division)
    mine = triton_sample(arguments["draft_logits"][:, 0], position=0, division=division, **rows)
    assert torch.equal(mine.tokens, theirs.tokens)
    torch.testing.assert_close(mine.logsumexp, theirs.logsumexp, rtol=1e-6, atol=2e-6)


# Bytes.

WIDTH = 4096
BYTES = {  # V-bytes per request with bfloat16 logits, 5 proposals and a rejection of the first
    "greedy": ({"temperature": torch.zeros(1)}, 12),
    "any temperature": ({"temperature": torch.full((1,), 0.7)}, 24),
    "any temperature, `draft_lse`": ({"draft_lse": 0}, 14),
    "point mass": ({"draft_logits": None}, 12),
    "block": ({"mode": "block"}, 40),
    "block, `draft_lse`": ({"mode": "block", "draft_lse": 0}, 30),
    "min-p": ({"min_p": torch.full((1,), 0.05)}, 48),
    "top-k": ({"top_k": torch.full((1,), 50)}, 70),
    "top-p": ({"top_p": torch.full((1,), 0.9)}, 70),
    "top-k and top-p": ({"top_k": torch.full((1,), 50), "top_p": torch.full((1,), 0.9)}, 70),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_read_are_those_of_the_readme(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what the interpreted kernels load from the logits."""
    from triton.runtime.interpreter import interpreter_builder

    settings, expected = BYTES[name]
    torch.manual_seed(0)
    target = torch.randn(1, 6, WIDTH) * 2.5 + 8
    draft = target[:, :5] + 0.3 * torch.randn(1, 5, WIDTH)
    target[..., 0] = -20.0  # what is proposed the target would never say
    target, draft = target.bfloat16(), draft.bfloat16()
    arguments: dict = {
        "draft_tokens": torch.zeros(1, 5, dtype=torch.int64),
        "draft_logits": draft,
        "target_logits": target,
        "lengths": torch.tensor([5]),
        "temperature": torch.ones(1),
        "seeds": torch.zeros(1, dtype=torch.int64),
        "step": torch.zeros(1, dtype=torch.int64),
        **settings,
    }
    if "draft_lse" in settings:
        arguments["draft_lse"] = torch.logsumexp(draft.float(), -1)
    load = interpreter_builder.create_masked_load
    loaded = 0

    def counted(pointers, mask, *more):
        nonlocal loaded
        for logits in (target, draft):
            start = logits.data_ptr()
            stop = start + logits.numel() * logits.element_size()
            inside = (pointers.data >= start) & (pointers.data < stop) & mask.data
            loaded += int(inside.sum()) * logits.element_size()
        return load(pointers, mask, *more)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", counted)
    out = verify(**arguments, backend="triton")
    assert out.num_accepted.tolist() == [0]
    # The numbers at the proposed tokens come on top, one each.
    assert loaded / WIDTH == pytest.approx(expected, abs=0.01 * expected)
    readme = Path(__file__).parents[1] / "kernels" / "README.md"
    row = next(line for line in readme.read_text().splitlines() if line.startswith(f"| {name} |"))
    assert row.split("|")[2].strip() == str(expected)
