"""The objective against independent float64 formulas in values and gradients, and against the
engine: tvd is one minus the acceptance it measures.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from chains import TABLE, Setting, V, draft_chain, stream, texts_of
from torch import Tensor

from specdistill.decoding import Sampling
from specdistill.errors import InputError
from specdistill.training.losses import (
    BLOCK_LOSSES,
    POSITION_LOSSES,
    Objective,
    Positions,
    objective,
    survival,
    total_loss,
)
from specdistill_kernels import Head, TargetStates, divergence, keep_top_k

LENGTHS = [5, 1, 7]
N, D, WIDTH = sum(LENGTHS), 4, 11
TRIMMED = torch.tensor([0, 3, 4, 9])


def positions(vocab: Tensor | None = None, chunk: int = 5) -> Positions:
    torch.manual_seed(2)
    states, weight, target = (
        torch.randn(*shape, dtype=torch.float64)
        for shape in ((N, D), (WIDTH if vocab is None else len(vocab), D), (WIDTH, D))
    )
    hidden = 2 * torch.randn(N, D, dtype=torch.float64)
    head = Head(target)
    return Positions(
        states.requires_grad_(),
        Head(weight.requires_grad_()),
        lambda t: TargetStates(
            hidden, head, head.logits(hidden).logsumexp(-1) if t == 1 else None, t
        ),
        torch.arange(N) % WIDTH,
        torch.tensor(LENGTHS),
        vocab,
        chunk,
    )


def softmax(logits: Tensor, temperature: float) -> np.ndarray:
    x = logits.detach().numpy() / temperature
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pairs(at: Positions, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """p and q [N, WIDTH]; q is 0 for tokens the draft lacks."""
    target = at.target(1.0)
    p = softmax(target.head.logits(target.hidden), temperature)
    q = np.zeros_like(p)
    columns = slice(None) if at.draft_vocab is None else at.draft_vocab.numpy()
    q[:, columns] = softmax(at.head.logits(at.states), temperature)
    return p, q


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(-1)


def forward_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    has = (q > 0).any(0)
    mass = p[:, has].sum(-1)
    return mass * kl(p[:, has] / mass[:, None], q[:, has])


def overlap(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.minimum(p, q).sum(-1)


def hybrid(p: np.ndarray, q: np.ndarray, t: float) -> np.ndarray:
    share = np.exp(-3 * overlap(p, q))
    return share * t**2 * forward_kl(p, q) + (1 - share) * (1 - overlap(p, q))


def expected_accepted(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """1 − Π α by blocks of 3, written as a loop."""
    out, start = [], 0
    for length in LENGTHS:
        for i in range(length):
            first = start + i - i % 3
            out.append(1 - math.prod(overlap(p, q)[first : start + i + 1].tolist()))
        start += length
    return np.array(out)


# One row a loss: which temperature it takes (the distillation's, the decoding's), and its formula.
FORMULAS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]]] = {
    "fkl": ("distillation", lambda p, q, t: t**2 * forward_kl(p, q)),
    "rkl": ("distillation", lambda p, q, t: t**2 * kl(q, p)),
    "jeffreys": ("distillation", lambda p, q, t: t**2 * (forward_kl(p, q) + kl(q, p)) / 2),
    "jsd": (
        "distillation",
        lambda p, q, t: t**2 * (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    ),
    "skew_kl": ("distillation", lambda p, q, t: t**2 * kl(p, 0.1 * p + 0.9 * q)),
    "skew_rkl": ("distillation", lambda p, q, t: t**2 * kl(q, 0.1 * q + 0.9 * p)),
    "tvd": ("decoding", lambda p, q, t: 0.5 * np.abs(p - q).sum(-1)),
    "lk_alpha": ("decoding", lambda p, q, t: -np.log(overlap(p, q))),
    "lk_hybrid": ("decoding", hybrid),
    "e2e_tv": ("decoding", lambda p, q, t: expected_accepted(p, q)),
}


def asked(loss: dict[str, float], **settings: float) -> Objective:
    block = {"num_draft_tokens": 3} if "e2e_tv" in loss else {}
    return objective(loss, **block, **settings)


def test_every_loss_has_a_row() -> None:
    assert {*FORMULAS, "ce"} == {*POSITION_LOSSES, *BLOCK_LOSSES}


@pytest.mark.parametrize("vocab", [None, TRIMMED], ids=["whole", "trimmed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_each_loss_is_its_formula_at_its_own_temperature(
    name: str, temperature: float, vocab: Tensor | None
) -> None:
    at = positions(vocab)
    kind, formula = FORMULAS[name]
    key = "temperature" if kind == "distillation" else "decoding_temperature"
    got = total_loss(at, asked({name: 1.0}, **{key: temperature}))
    expected = formula(*pairs(at, temperature), temperature).sum()
    assert got.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("vocab", [None, TRIMMED], ids=["whole", "trimmed"])
def test_a_mixture_weighs_its_parts_each_at_its_temperature(vocab: Tensor | None) -> None:
    """Hard labels at 1, KL at 2, overlap at 0.7: three temperatures in one loss."""
    at = positions(vocab)
    loss = {"ce": 0.1, "fkl": 0.5, "tvd": 0.9, "e2e_tv": 0.3}
    got = total_loss(at, asked(loss, temperature=2.0, decoding_temperature=0.7))
    (_, q), warm, cool = pairs(at, 1.0), pairs(at, 2.0), pairs(at, 0.7)
    own = q[np.arange(N), at.labels.numpy()]
    expected = 0.1 * -np.log(own[own > 0]).sum()
    expected += 0.5 * 4 * forward_kl(*warm).sum() + 0.9 * (1 - overlap(*cool)).sum()
    expected += 0.3 * expected_accepted(*cool).sum()
    assert got.item() == pytest.approx(expected, rel=1e-9)
    only = total_loss(at, asked({"ce": 2.0})).item()
    assert only == pytest.approx(-2 * np.log(own[own > 0]).sum(), rel=1e-9)


def test_losses_of_one_temperature_share_a_pass_over_the_head() -> None:
    names = {"fkl": 1.0, "ce": 0.1, "tvd": 0.5}
    assert asked(names).by_temperature() == {1.0: {"fkl": 1.0, "tvd": 0.5, "ce": 0.1}}
    apart = asked(names, temperature=2.0).by_temperature()
    assert apart == {2.0: {"fkl": 1.0, "ce": 0.1}, 1.0: {"tvd": 0.5}}


@pytest.mark.parametrize("vocab", [None, TRIMMED], ids=["whole", "trimmed"])
@pytest.mark.parametrize("name", [n for n in (*FORMULAS, "ce") if n != "lk_hybrid"])
def test_gradcheck(name: str, vocab: Tensor | None) -> None:
    """lk_hybrid's share has no gradient; the kernels' tests take it apart."""
    at = positions(vocab)

    def of(states: Tensor, weight: Tensor) -> Tensor:
        here = {**vars(at), "states": states, "head": Head(weight)}
        key = {"temperature": 1.4} if FORMULAS.get(name, [""])[0] == "distillation" else {}
        return total_loss(Positions(**here), asked({name: 0.7}, **key))

    assert torch.autograd.gradcheck(of, (at.states, at.head.weight), fast_mode=True)


def test_t_squared_keeps_the_scale_of_gradients() -> None:
    """For large T the gradient tends to one without T (1503.02531, section 2.1)."""
    grads = []
    for temperature in (50.0, 100.0):
        at = positions()
        total_loss(at, asked({"fkl": 1.0}, temperature=temperature)).backward()
        grads.append(at.states.grad)
    assert torch.allclose(grads[0], grads[1], rtol=0.1, atol=0.05)
    assert grads[0].abs().max() > 0.1


# Blocks


def test_the_expected_accepted_share_in_closed_form() -> None:
    """α = 1/2 everywhere: a full block of 3 keeps (1/2 + 1/4 + 1/8) / 3 of it, and answers do not
    share blocks.
    """
    alive = survival(torch.full((6,), 0.5), torch.tensor([4, 2]), 3)
    assert alive.tolist() == [0.5, 0.25, 0.125, 0.5, 0.5, 0.25]
    alive = survival(torch.tensor([0.5, 0.0, 0.7]), torch.tensor([0, 3]), 8)
    assert alive.tolist() == [0.5, 0, 0]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_blocks_of_one_token_are_tvd(chunk: int) -> None:
    values = []
    for loss, block in ((("e2e_tv"), {"num_draft_tokens": 1}), ("tvd", {})):
        at = positions(TRIMMED, chunk)
        value = total_loss(at, objective({loss: 1.0}, **block))
        value.backward()
        values.append((value.item(), at.states.grad, at.head.weight.grad))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-12)
    assert torch.allclose(values[0][1], values[1][1], atol=1e-12)
    assert torch.allclose(values[0][2], values[1][2], atol=1e-12)


def test_a_later_token_of_a_block_counts_less() -> None:
    """Its α is multiplied by those before it, so its gradient is smaller than tvd's."""
    at = positions()
    total_loss(at, asked({"e2e_tv": 1.0})).backward()
    blockwise, at = at.states.grad, positions()
    total_loss(at, asked({"tvd": 1.0})).backward()
    ratio = (blockwise.norm(dim=1) / at.states.grad.norm(dim=1)).tolist()
    alpha = overlap(*pairs(at, 1.0))
    assert ratio[2] == pytest.approx(alpha[0] * alpha[1], rel=1e-9)  # last of a block of three
    assert ratio[0] == pytest.approx(1 + alpha[1] + alpha[1] * alpha[2], rel=1e-9)
    assert ratio[5] == pytest.approx(1, rel=1e-9)  # an answer of one token


# The engine


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("draft", ["near", "trimmed"])
def test_tvd_is_one_minus_the_acceptance_the_engine_measures(
    draft: str, temperature: float
) -> None:
    """accepted / tested over 24,000 tokens and the mean tvd of the very same states."""
    run = stream(Setting(Sampling(temperature), draft), rows=40, length=600)
    contexts, accepted = [], 0
    for text, output in zip(texts_of(run), run.outputs, strict=True):
        start = 0
        for r in output.rounds:
            contexts += [text[i : i + 2] for i in range(start, start + r.tested)]
            accepted += r.accepted
            start += len(r.tokens)
    pair = torch.tensor(np.array(contexts))
    model = draft_chain(draft)
    q = model.head(model.model.table.weight[pair[:, 0] * V + pair[:, 1]])
    losses = divergence(
        q.double(),
        TABLE[pair[:, 0], pair[:, 1]].double(),
        loss="tvd",
        temperature=temperature,
        draft_vocab=model.vocab,
    )
    expected = (1 - losses).numpy()
    sigma = np.sqrt((expected * (1 - expected)).sum()) / len(expected)
    assert 0.2 < accepted / len(expected) < 0.9
    assert sigma < 0.004
    assert accepted / len(expected) == pytest.approx(expected.mean(), abs=4 * sigma)


# What is refused


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ({"fkld": 1.0}, {}, "unknown loss 'fkld'; choose from fkl, .*e2e_tv"),
        ({}, {}, "empty"),
        ({"fkl": -1.0}, {}, "weight of loss 'fkl'"),
        ({"e2e_tv": math.nan}, {"num_draft_tokens": 3}, "weight of loss 'e2e_tv'"),
        ({"tvd": 1.0}, {"temperature": 2.0}, "temperature: 2.0 has no effect.*decoding_temp"),
        ({"ce": 1.0}, {"temperature": 2.0}, "no effect on the loss ce"),
        ({"fkl": 1.0}, {"decoding_temperature": 0.7}, "decoding_temperature: 0.7 has no effect"),
        ({"fkl": 1.0}, {"num_draft_tokens": 3}, "given with that loss and with no other; got 3"),
        ({"e2e_tv": 1.0}, {}, "must be given with that loss and with no other; got None"),
        ({"fkl": 1.0}, {"beta": 0.3}, "beta belongs to the loss 'jsd'"),
        ({"fkl": 1.0}, {"skew": 0.3}, "skew belongs"),
        ({"jsd": 1.0}, {"beta": 1.3}, "beta must be"),
        ({"tvd": 1.0}, {"eta": 3.0}, "eta belongs"),
    ],
)
def test_what_has_no_meaning_is_refused(
    loss: dict[str, float], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        objective(loss, **settings)


def test_settings_reach_their_loss() -> None:
    at = positions()
    p, q = pairs(at, 1.0)
    for loss, settings, expected in (
        ("jsd", {"beta": 0.2}, 0.2 * kl(p, 0.2 * p + 0.8 * q) + 0.8 * kl(q, 0.2 * p + 0.8 * q)),
        ("skew_kl", {"skew": 0.4}, kl(p, 0.4 * p + 0.6 * q)),
        ("skew_rkl", {"skew": 0.4}, kl(q, 0.4 * q + 0.6 * p)),
        ("lk_hybrid", {"eta": 0.0}, kl(p, q)),
    ):
        got = total_loss(at, objective({loss: 1.0}, **settings))
        assert got.item() == pytest.approx(expected.sum(), rel=1e-9)
    two = objective({"jsd": 1.0, "tvd": 1.0}, beta=0.2, decoding_temperature=0.5)
    assert total_loss(at, two).isfinite()


def test_a_top_k_target_serves_every_loss() -> None:
    at = positions()
    full = at.target(1.0)
    kept = keep_top_k(full.head.logits(full.hidden), WIDTH - 1)  # a tail of one token is no lump
    lumped = Positions(**{**vars(at), "target": lambda t: kept})
    for name in FORMULAS:
        got, exact = (total_loss(x, asked({name: 1.0})).item() for x in (lumped, at))
        assert got == pytest.approx(exact, rel=1e-9), name
