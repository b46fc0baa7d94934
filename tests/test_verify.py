"""Speculative sampling: the reference against the definition, by exact rules and by statistics."""

import pytest
import torch
from scipy import stats

from specdistill_kernels import (
    RowSettings,
    counter_noise,
    probabilities,
    sample,
    sample_places,
    verify,
)
from specdistill_kernels.verification.noise import exponential

V = 16


def rows(batch: int, seed: int = 0, **more: float | int) -> RowSettings:
    """Of independent requests."""
    kinds = {"temperature": torch.float64, "top_p": torch.float64, "min_p": torch.float64}
    columns = {
        name: torch.full((batch,), value, dtype=kinds.get(name, torch.int64))
        for name, value in {"temperature": 1.0, **more}.items()
    }
    seeds = torch.arange(batch) + 1_000_003 * seed
    return RowSettings(seeds=seeds, step=torch.zeros_like(seeds), **columns)


def one_round(p_logits, q_logits, batch: int, vocab=None, **settings):
    """`batch` independent rounds over the same rows: p_logits [G+1, V], q_logits [G, Vd]."""
    num = len(q_logits)
    args = rows(batch, **settings)
    q = q_logits.expand(batch, -1, -1)
    drawn = torch.stack([sample(q[:, i], rows=args, position=i).tokens for i in range(num)], 1)
    tokens = drawn if vocab is None else vocab[drawn]
    lengths = torch.full((batch,), num)
    return tokens, verify(
        tokens, q, p_logits.expand(batch, -1, -1), lengths=lengths, draft_vocab=vocab, rows=args
    )


def p_value(tokens: torch.Tensor, p: torch.Tensor) -> float:
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0, "a token of probability 0 was emitted"
    expected = p.double() / p.double().sum() * counts.sum()
    return float(stats.chisquare(counts[p > 0], expected[p > 0]).pvalue)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "min_p": 0.1}, {"temperature": 0.0}])
def test_all_places_at_once_draw_what_each_draws_alone(settings: dict[str, float]) -> None:
    torch.manual_seed(5)
    logits, args = torch.randn(7, 4, V), rows(7, seed=2, **settings)
    if not settings:
        args = args._replace(temperature=torch.tensor([0, 0.3, 1, 2, 0, 1, 1.0]).double())
    together = sample_places(logits, args)
    alone = [sample(logits[:, i], args, position=i) for i in range(4)]
    assert torch.equal(together.tokens, torch.stack([each.tokens for each in alone], 1))
    assert torch.equal(together.logsumexp, torch.stack([each.logsumexp for each in alone], 1))


def test_a_trimmed_draft_is_lossless_and_proposes_only_its_tokens() -> None:
    torch.manual_seed(3)
    vocab = torch.tensor([1, 4, 5, 9, 14])
    p_logits = torch.randn(3, V)
    tokens, out = one_round(p_logits, p_logits[:2, vocab] * 0.7, 100_000, vocab=vocab)
    assert set(tokens.unique().tolist()) <= set(vocab.tolist())
    assert p_value(out.tokens[:, 0], p_logits[0].softmax(-1)) > 1e-4
    assert set(out.tokens[:, 0].unique().tolist()) == set(range(V))


def test_a_draft_without_logits_is_a_point_mass() -> None:
    torch.manual_seed(4)
    p_logits = torch.randn(2, V)
    n = 100_000
    args = rows(n)
    tokens = torch.full((n, 1), 3)
    out = verify(
        tokens,
        None,
        p_logits.expand(n, -1, -1),
        lengths=torch.ones(n, dtype=torch.int64),
        rows=args,
    )
    p = p_logits.softmax(-1)
    assert p_value(out.tokens[:, 0], p[0]) > 1e-4
    assert out.num_accepted.double().mean().item() == pytest.approx(p[0, 3].item(), abs=0.01)


def test_the_target_as_its_own_draft_accepts_everything() -> None:
    p_logits = torch.randn(5, 64, dtype=torch.float64) * 4
    _, out = one_round(p_logits, p_logits[:4], 20_000)
    assert (out.num_accepted == 4).all()
    assert p_value(out.tokens[:, 4] % 8, p_logits[4].softmax(-1).view(8, 8).sum(0)) > 1e-4


def test_greedy_rows_emit_the_first_maximum_whatever_the_draft_says() -> None:
    torch.manual_seed(5)
    target = torch.randn(64, 5, V)
    target[0, 0, [3, 7]] = 9.0  # a tie: the lower id wins
    draft = torch.where(
        torch.rand(64, 4) < 0.7, target[:, :4].argmax(-1), torch.randint(V, (64, 4))
    )
    out = verify(
        draft,
        torch.full((64, 4, V), float("nan")),
        target,
        lengths=torch.full((64,), 4),
        rows=rows(64, temperature=0.0),
    )
    best = target.argmax(-1)
    for b in range(64):
        n = out.num_accepted[b].item()
        assert out.tokens[b, : n + 1].tolist() == best[b, : n + 1].tolist()
        assert n == 4 or draft[b, n] != best[b, n]
        assert (out.tokens[b, n + 1 :] == -1).all()
    assert out.tokens[0, 0] == 3


def test_mixed_rows_equal_rows_alone() -> None:
    """A greedy row, a filtered row and a plain row in one batch give what each gives alone;
    `lengths` are ragged.
    """
    torch.manual_seed(6)
    target, draft = torch.randn(3, 4, V), torch.randn(3, 3, V)
    settings = RowSettings(
        temperature=torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64),
        top_k=torch.tensor([0, 6, 0]),
        top_p=torch.tensor([1.0, 0.9, 1.0], dtype=torch.float64),
        seeds=torch.tensor([5, 6, 7]),
        step=torch.tensor([0, 3, 9]),
    )
    tokens = torch.stack([sample(draft[:, i], settings, position=i).tokens for i in range(3)], 1)
    lengths = torch.tensor([3, 2, 0])
    together = verify(tokens, draft, target, lengths=lengths, rows=settings)
    for b in range(3):
        pick = slice(b, b + 1)
        alone = verify(
            tokens[pick], draft[pick], target[pick], lengths=lengths[pick], rows=settings.of(pick)
        )
        assert torch.equal(alone.tokens[0], together.tokens[b])
    assert together.num_accepted[2] == 0
    assert (together.num_accepted <= lengths).all()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")], ids=["nan", "-inf"])
def test_a_bad_draft_row_is_a_rejection_drawn_from_the_target(bad: float) -> None:
    p_logits = torch.randn(2, V)
    q_logits = torch.full((1, V), bad)
    tokens, out = one_round(p_logits, q_logits, 50_000)
    assert (tokens == 0).all()
    assert (out.num_accepted == 0).all()
    assert p_value(out.tokens[:, 0], p_logits[0].softmax(-1)) > 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_bad_target_row_gives_minus_one(bad: float, temperature: float) -> None:
    target = torch.randn(2, 2, V)
    target[1, 0] = bad
    out = verify(
        torch.tensor([[1], [1]]),
        torch.randn(2, 1, V),
        target,
        lengths=torch.tensor([1, 1]),
        rows=rows(2, temperature=temperature),
    )
    assert out.tokens[1].tolist() == [-1, -1]
    assert out.tokens[0, 0] >= 0


def test_padded_proposals_are_not_tested() -> None:
    target = torch.zeros(1, 4, V)
    target[..., 2] = 50
    out = verify(
        torch.tensor([[2, -1, 2]]),
        None,
        target,
        lengths=torch.tensor([3]),
        rows=rows(1, temperature=0.0),
    )
    assert out.tokens.tolist() == [[2, 2, -1, -1]]


def test_filters_keep_ties_and_at_least_one_token() -> None:
    logits = torch.tensor([[2.0, 2.0, 2.0, 0.0, -1.0]])
    one = rows(1, top_k=2)
    assert (probabilities(logits, one.temperature, top_k=one.top_k) > 0).sum() == 3
    one = rows(1, top_p=1e-9)
    assert (probabilities(logits, one.temperature, top_p=one.top_p) > 0).sum() == 3
    peaked = torch.tensor([[9.0, 0.0, 0.0]])
    assert probabilities(peaked, one.temperature, top_p=one.top_p).tolist() == [[1.0, 0.0, 0.0]]
    one = rows(1, min_p=0.5)
    assert (
        probabilities(torch.tensor([[0.6, 0.31, 0.09]]).log(), one.temperature, min_p=one.min_p) > 0
    ).sum() == 2


def test_noise_is_uniform_and_separate() -> None:
    seeds = torch.arange(2000)
    zero = torch.zeros_like(seeds)
    tokens = torch.arange(64)
    base = counter_noise(seeds, zero, zero, 1, tokens)
    assert base.min() >= 0
    assert base.max() < 2**32
    assert stats.kstest((base.double() / 2**32).flatten().numpy(), "uniform").pvalue > 1e-4
    for other in (
        counter_noise(seeds, zero, zero, 2, tokens),
        counter_noise(seeds, zero + 1, zero, 1, tokens),
        counter_noise(seeds, zero, zero + 1, 1, tokens),
        counter_noise(seeds + (1 << 40), zero, zero, 1, tokens),
        counter_noise(seeds, zero, zero, 1, tokens + 1),
    ):
        r = stats.pearsonr(base.flatten().double().numpy(), other.flatten().double().numpy())
        assert abs(r.statistic) < 0.015
    assert exponential(torch.tensor([0])).item() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_logits": torch.zeros(2, 2, V)}, "target_logits must be"),
        ({"draft_logits": torch.zeros(2, 1, V)}, "draft_logits must be"),
        ({"draft_logits": torch.zeros(2, 2, 3)}, "wide"),
        ({"lengths": torch.tensor([1])}, "lengths must be"),
        ({"rows": rows(3)}, "temperature must be"),
        ({"rows": rows(2)._replace(top_k=torch.ones(1))}, "top_k must be"),
        ({"backend": "cuda"}, "does not exist"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    good = {
        "draft_tokens": torch.zeros(2, 2, dtype=torch.int64),
        "draft_logits": torch.zeros(2, 2, V),
        "target_logits": torch.zeros(2, 3, V),
        "lengths": torch.tensor([2, 2]),
        "rows": rows(2),
    }
    with pytest.raises(ValueError, match=message):
        verify(**{**good, **change})
