"""Losses against independent float64 formulas, in values and gradients."""

import math

import pytest
import torch

from specdistill.divergences import DIVERGENCES, Positions, ce, chunked_sum, fkl, mixture
from specdistill.errors import InputError


def positions(
    n: int = 5, v: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Positions, torch.Tensor]:
    torch.manual_seed(n * v)
    target = Positions(
        torch.randn(n, v, dtype=dtype) * 3, torch.randint(v, (n,)), torch.ones(n, dtype=dtype)
    )
    return target, torch.randn(n, v, dtype=dtype, requires_grad=True)


def plain_fkl(p_logits: list[float], q_logits: list[float], temperature: float) -> float:
    def softmax(x: list[float]) -> list[float]:
        weights = [math.exp(value / temperature) for value in x]
        return [w / sum(weights) for w in weights]

    p, q = softmax(p_logits), softmax(q_logits)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fkl_is_the_sum_over_the_vocabulary_times_t_squared(temperature: float) -> None:
    target, draft = positions()
    expected = [
        plain_fkl(p, q, temperature)
        for p, q in zip(target.logits.tolist(), draft.tolist(), strict=True)
    ]
    assert fkl(target, draft, temperature).tolist() == pytest.approx(expected, rel=1e-9)


def test_fkl_gradient_is_q_minus_p() -> None:
    target, draft = positions()
    fkl(target, draft, 1.0).sum().backward()
    assert torch.allclose(draft.grad, draft.softmax(-1) - target.logits.softmax(-1), atol=1e-12)


def test_t_squared_keeps_the_scale_of_gradients() -> None:
    """For large T the gradient tends to the difference of centred logits / V, whatever T (Hinton,
    section 2.1).
    """
    grads = []
    for temperature in (50.0, 100.0):
        target, draft = positions()
        fkl(target, draft, temperature).sum().backward()
        grads.append(draft.grad)
    assert torch.allclose(grads[0], grads[1], rtol=0.1, atol=0.02)
    assert grads[0].abs().max() > 0.1


def test_fkl_is_zero_exactly_where_the_models_agree_and_bears_minus_infinity() -> None:
    target, _ = positions()
    assert fkl(target, target.logits.clone() + 3, 1.0).abs().max() < 1e-12
    target.logits[:, 2] = -torch.inf
    draft = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    loss = fkl(target, draft, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert draft.grad.isfinite().all()


def test_fkl_weighs_a_trimmed_vocabulary_by_its_mass() -> None:
    """Over kept tokens K with mass m: m · KL(p/m ‖ q), which is never negative; masses differ by
    position.
    """
    torch.manual_seed(0)
    full, keep = torch.randn(4, 12, dtype=torch.float64) * 2, torch.tensor([0, 3, 4, 9])
    p = full.softmax(-1)[:, keep]
    mass = p.sum(-1)
    draft = torch.randn(4, 4, dtype=torch.float64)
    q = draft.softmax(-1)
    expected = mass * ((p / mass[:, None]) * ((p / mass[:, None]) / q).log()).sum(-1)
    got = fkl(Positions(full[:, keep], torch.zeros(4, dtype=torch.int64), mass), draft, 1.0)
    assert torch.allclose(got, expected, atol=1e-12)
    assert (got >= 0).all()


def test_ce_is_taken_at_temperature_one_and_skips_missing_tokens() -> None:
    target, draft = positions()
    target.labels[1] = -1
    loss = ce(target, draft, 7.0)
    expected = -draft.log_softmax(-1)[torch.arange(5), target.labels.clamp(min=0)]
    assert loss[1] == 0
    kept = [0, 2, 3, 4]
    assert torch.allclose(loss[kept], expected[kept])
    loss.sum().backward()
    assert draft.grad[1].abs().max() == 0


def test_mixture_weighs_its_parts() -> None:
    target, draft = positions()
    both = mixture({"fkl": 0.9, "ce": 0.1})(target, draft, 2.0)
    assert torch.allclose(both, 0.9 * fkl(target, draft, 2.0) + 0.1 * ce(target, draft, 2.0))
    for bad in ({}, {"fkld": 1.0}, {"fkl": -1.0}, {"fkl": float("nan")}):
        with pytest.raises(InputError):
            mixture(bad)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_gradcheck(name: str) -> None:
    target, draft = positions(3, 4)
    assert torch.autograd.gradcheck(lambda q: DIVERGENCES[name](target, q, 1.7), (draft,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_sum_equals_the_plain_sum_in_value_and_gradients(bias: bool, chunk: int) -> None:
    torch.manual_seed(1)
    target, _ = positions(10, 6)
    hidden = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    head = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True)]
    head += [torch.randn(6, dtype=torch.float64, requires_grad=True)] if bias else []

    def rows_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        part = Positions(target.logits[rows], target.labels[rows], target.kept_mass[rows])
        return fkl(part, logits, 1.0) + 0.3 * ce(part, logits, 1.0)

    plain = 2.5 * rows_loss(torch.nn.functional.linear(hidden, *head), slice(None)).sum()
    expected = torch.autograd.grad(plain, [hidden, *head])
    chunked = 2.5 * chunked_sum(hidden, head, rows_loss, chunk)
    got = torch.autograd.grad(chunked, [hidden, *head])
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_chunked_sum_never_holds_more_than_a_chunk_of_logits() -> None:
    seen: list[int] = []

    def rows_loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        seen.append(len(logits))
        return logits.square().sum(-1)

    chunked_sum(
        torch.randn(25, 3, requires_grad=True), [torch.randn(9, 3)], rows_loss, 8
    ).backward()
    assert seen == [8, 8, 8, 1]
