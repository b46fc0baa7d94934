"""The fused losses against textbook formulas in float64 numpy, and against plain autograd."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from specdistill_kernels import divergences
from specdistill_kernels.divergences import divergence, divergence_rows, fused_divergence
from specdistill_kernels.divergences.reference import LOSSES
from specdistill_kernels.divergences.targets import (
    Head,
    TargetStates,
    TargetTopK,
    draft_columns,
    keep_top_k,
)

FORMS = ("logits", "states", "states+lse", "top-k")
Loss = str | dict[str, float]
MIXTURE: Loss = {"fkl": 0.5, "jsd": 0.3, "tvd": 1.0, "lk_alpha": 0.2, "lk_hybrid": 0.7, "ce": 0.1}
EACH_AND_ALL = [*LOSSES, pytest.param(MIXTURE, id="mixture")]
N, D, DP, V = 7, 5, 6, 23
TRIMMED = torch.tensor([11, 2, 19, 0, 7, 22, 3, 16])


def case(
    form: str = "logits",
    *,
    vocab: Tensor | None = None,
    temperature: float = 1.0,
    n: int = N,
    v: int = V,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Arguments of `fused_divergence`, with gradients wanted for hidden states, weight and bias."""
    torch.manual_seed(n * v)
    width = v if vocab is None else len(vocab)
    hidden, weight, bias = (
        (torch.randn(*shape, dtype=torch.float64) * 0.8).to(dtype).requires_grad_()
        for shape in ((n, D), (width, D), (width,))
    )
    states, target_head = torch.randn(n, DP, dtype=dtype), Head(torch.randn(v, DP, dtype=dtype))
    logits = target_head.logits(states)
    lse = (logits.double() / temperature).logsumexp(-1).to(logits.dtype)
    target = {
        "logits": logits,
        "states": TargetStates(states, target_head),
        "states+lse": TargetStates(states, target_head, lse, temperature),
        "top-k": keep_top_k(logits, 4, temperature=temperature),
    }[form]
    labels = torch.randint(v, (n,))
    labels[n // 2] = -100
    return {
        "hidden": hidden,
        "head": Head(weight, bias),
        "target": target,
        "labels": labels,
        "draft_vocab": vocab,
        "temperature": temperature,
    }


def leaves(arguments: dict) -> list[Tensor]:
    head = arguments["head"]
    return [x for x in (arguments["hidden"], head.weight, head.bias) if x is not None]


def plain(arguments: dict, **kwargs: object) -> Tensor:
    """[N] losses by autograd on everything at once."""
    rest = {k: v for k, v in arguments.items() if k not in ("hidden", "head")}
    logits = arguments["head"].logits(arguments["hidden"])
    return divergence(logits, **rest, **kwargs)


def gradients(value: Tensor, arguments: dict) -> list[Tensor]:
    return list(torch.autograd.grad(value, leaves(arguments)))


def assert_close(got: list[Tensor], expected: list[Tensor], rel: float = 1e-9) -> None:
    """Up to `rel` of each expected tensor's largest entry."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max()
        assert error <= rel * b.double().abs().max().clamp(min=1e-30), (error, b.abs().max())


# Independent of torch's formulas: probabilities over the whole vocabulary, in numpy.


def softmax(z: np.ndarray, temperature: float) -> np.ndarray:
    e = np.exp((z - z.max()) / temperature)
    return e / e.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    on = p > 0
    return float((p[on] * np.log(p[on] / q[on])).sum())


def textbook(
    name: str,
    p: np.ndarray,
    q: np.ndarray,
    t: float,
    has: np.ndarray,
    beta: float = 0.5,
    skew: float = 0.1,
    eta: float = 3.0,
) -> float:
    """p, q: over all outcomes; has: those the draft has."""
    alpha, mass, m = np.minimum(p, q).sum(), p[has].sum(), beta * p + (1 - beta) * q
    forward = mass * kl(p[has] / mass, q[has])
    if name == "lk_hybrid":
        share = math.exp(-eta * alpha)
        return share * t**2 * forward + (1 - share) * 0.5 * np.abs(p - q).sum()
    return {
        "fkl": lambda: t**2 * forward,
        "rkl": lambda: t**2 * kl(q, p),
        "jeffreys": lambda: t**2 * (forward + kl(q, p)) / 2,
        "skew_kl": lambda: t**2 * kl(p, skew * p + (1 - skew) * q),
        "skew_rkl": lambda: t**2 * kl(q, skew * q + (1 - skew) * p),
        "jsd": lambda: t**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)),
        "tvd": lambda: 0.5 * np.abs(p - q).sum(),
        "lk_alpha": lambda: -math.log(alpha),
    }[name]()


def by_hand(arguments: dict, name: str, **options: float) -> np.ndarray:
    t, vocab, target = (arguments[k] for k in ("temperature", "draft_vocab", "target"))
    draft = arguments["head"].logits(arguments["hidden"]).detach().double().numpy()
    columns = np.arange(draft.shape[1]) if vocab is None else vocab.numpy()
    out = []
    for i, row in enumerate(draft):
        if name == "ce":
            (at,) = np.nonzero(columns == arguments["labels"][i].item())
            out.append(-math.log(softmax(row, 1.0)[at[0]]) if len(at) else 0.0)
            continue
        q, has = np.zeros(V), np.zeros(V, dtype=bool)
        q[columns], has[columns] = softmax(row, t), True
        if isinstance(target, TargetTopK):
            top = target.tokens[i].numpy()
            rest = np.setdiff1d(np.arange(V), top)
            p = np.append(np.exp(target.log_probs[i].numpy()), math.exp(target.log_tail[i]))
            q, has = np.append(q[top], q[rest].sum()), np.append(has[top], has[rest].any())
        else:
            whole = isinstance(target, TargetStates)
            logits = target.head.logits(target.hidden) if whole else target
            p = softmax(logits[i].double().numpy(), t)
        out.append(textbook(name, p, q, t, has, **options))
    return np.array(out)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("vocab", [None, TRIMMED], ids=["whole", "trimmed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_are_the_textbook_ones(
    name: str, form: str, vocab: Tensor | None, temperature: float
) -> None:
    arguments = case(form, vocab=vocab, temperature=temperature)
    expected = by_hand(arguments, name)
    assert plain(arguments, loss=name).detach().numpy() == pytest.approx(expected, abs=1e-10)
    fused = fused_divergence(**arguments, loss=name, chunk=3)
    assert fused.item() == pytest.approx(expected.sum(), abs=1e-9)
    rows = divergence_rows(**arguments, loss=name, chunk=3)
    assert rows.numpy() == pytest.approx(expected, abs=1e-10)
    assert not rows.requires_grad


def test_two_outcomes_in_closed_form() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = torch.tensor([[0.75, 0.25]]).double().log(), torch.zeros(1, 2, dtype=torch.float64)
    log = math.log
    forward, backward = log(3) - 1.5 * log(2) + 0.5 * log(2) - 0.25 * log(3), log(2) - 0.5 * log(3)
    expected = {
        "fkl": forward,
        "rkl": backward,
        "jsd": 0.5 * (0.75 * log(6 / 5) + 0.25 * log(2 / 3) + 0.5 * log(4 / 5) + 0.5 * log(4 / 3)),
        "jeffreys": (forward + backward) / 2,
        "skew_kl": 0.75 * log(0.75 / 0.525) + 0.25 * log(0.25 / 0.475),  # m = p/10 + 9q/10
        "skew_rkl": 0.5 * log(0.5 / 0.725) + 0.5 * log(0.5 / 0.275),
        "tvd": 0.25,
        "lk_alpha": -log(0.75),
        "lk_hybrid": math.exp(-2.25) * forward + (1 - math.exp(-2.25)) * 0.25,
        "ce": log(2),
    }
    for name in LOSSES:
        value = divergence(q, p, loss=name, labels=torch.tensor([1]))
        assert value.item() == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "ce"])
def test_zero_where_draft_and_target_agree(name: str) -> None:
    logits = torch.randn(3, 400, dtype=torch.float32, requires_grad=True)
    value = divergence(logits, logits.detach() + 2, loss=name).sum()
    assert value.item() == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    if name not in ("tvd", "lk_alpha", "lk_hybrid"):  # a kink, where rounding decides the side
        assert gradient.abs().max() < 1e-6
    same = divergence(logits, logits.detach(), loss=name).sum()
    assert torch.autograd.grad(same, logits)[0].abs().max() < 1e-6  # exact ties have no side


def test_beta_skew_and_eta() -> None:
    arguments = case(temperature=1.4)
    for beta in (0.1, 0.9):
        got = plain(arguments, loss="jsd", beta=beta).detach().numpy()
        assert got == pytest.approx(by_hand(arguments, "jsd", beta=beta), abs=1e-10)
    assert torch.equal(plain(arguments, loss="jsd", beta=0), plain(arguments, loss="fkl"))
    assert torch.equal(plain(arguments, loss="jsd", beta=1), plain(arguments, loss="rkl"))
    both = plain(arguments, loss={"jsd": 0.5, "fkl": 1.0}, beta=0)
    assert torch.allclose(both, 1.5 * plain(arguments, loss="fkl"))
    for name in ("skew_kl", "skew_rkl"):
        got = plain(arguments, loss=name, skew=0.3).detach().numpy()
        assert got == pytest.approx(by_hand(arguments, name, skew=0.3), abs=1e-10)
    got = plain(arguments, loss="lk_hybrid", eta=1.0).detach().numpy()
    assert got == pytest.approx(by_hand(arguments, "lk_hybrid", eta=1.0), abs=1e-10)


@pytest.mark.parametrize("vocab", [None, TRIMMED], ids=["whole", "trimmed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "lk_hybrid"])
def test_gradcheck(name: str, form: str, vocab: Tensor | None) -> None:
    arguments = case(form, vocab=vocab, temperature=1.3, n=3)

    def of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, scale=1.2, softcap=4.0)
        return fused_divergence(**{**arguments, "hidden": hidden, "head": head}, loss=name, chunk=2)

    assert torch.autograd.gradcheck(of, leaves(arguments), fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_lk_hybrid_has_no_gradient_through_its_share(form: str) -> None:
    arguments = case(form, vocab=TRIMMED, temperature=1.3, n=1)
    alpha = math.exp(-plain(arguments, loss="lk_alpha").item())
    share = math.exp(-3 * alpha)
    parts = {"fkl": share, "tvd": 1 - share}
    got = fused_divergence(**arguments, loss="lk_hybrid")
    expected = fused_divergence(**arguments, loss=parts)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_close(gradients(got, arguments), gradients(expected, arguments))


def test_gradient_of_lk_alpha_is_that_of_tvd_over_alpha() -> None:
    arguments = case(n=1)
    alpha = math.exp(-plain(arguments, loss="lk_alpha").item())
    got = gradients(fused_divergence(**arguments, loss="lk_alpha"), arguments)
    tvd = gradients(fused_divergence(**arguments, loss="tvd"), arguments)
    assert_close(got, [g / alpha for g in tvd])


@pytest.mark.parametrize("chunk", [1, 5, 1024])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_chunks_equal_plain_autograd(form: str, bias: bool, chunk: int) -> None:
    arguments = case(form, vocab=TRIMMED, temperature=0.8, n=13)
    if not bias:
        arguments["head"] = Head(arguments["head"].weight)
    weights = torch.rand(13, dtype=torch.float64)
    got = fused_divergence(**arguments, loss=MIXTURE, weights=weights, chunk=chunk)
    expected = (weights * plain(arguments, loss=MIXTURE)).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_close(gradients(got, arguments), gradients(expected, arguments))
    with torch.no_grad():
        quiet = fused_divergence(**arguments, loss=MIXTURE, weights=weights, chunk=chunk)
    assert quiet.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", EACH_AND_ALL)
def test_dtypes(loss: Loss, form: str, dtype: torch.dtype, rel: float) -> None:
    """Against float64 from the same logits: overlap losses have kinks, and another rounding of the
    logits may be on their other side.
    """
    arguments = case(form, dtype=dtype, n=33, v=129)
    got = fused_divergence(**arguments, loss=loss)
    assert got.dtype == torch.float32
    hidden, weight, _ = (x.detach().double() for x in leaves(arguments))
    target = arguments["target"]
    if isinstance(target, TargetStates):
        target = target.head.logits(target.hidden)
    logits = arguments["head"].logits(arguments["hidden"]).detach().double().requires_grad_()
    expected = divergence(
        logits,
        target.double() if isinstance(target, Tensor) else target,
        loss=loss,
        labels=arguments["labels"],
    ).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    (by_logits,) = torch.autograd.grad(expected, logits)
    wanted = [by_logits @ weight, by_logits.T @ hidden, by_logits.sum(0)]
    narrow = gradients(got, arguments)
    assert all(g.dtype == dtype for g in narrow)
    assert_close(narrow, wanted, rel)


@pytest.mark.parametrize("loss", EACH_AND_ALL)
def test_a_vocabulary_of_151936(loss: Loss) -> None:
    torch.manual_seed(0)
    v = 151_936
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(v, 4, requires_grad=True)
    target, labels = torch.randn(2, v) * 3, torch.tensor([v - 1, 5])
    arguments = {"hidden": hidden, "head": Head(weight), "target": target, "labels": labels}
    got = fused_divergence(**arguments, loss=loss)
    exact = {
        **arguments,
        "hidden": hidden.detach().double().requires_grad_(),
        "head": Head(weight.detach().double().requires_grad_()),
    }
    expected = plain(exact, loss=loss).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    # float32 sums of as many terms, in whatever order the machine's library takes them
    assert_close(gradients(got, arguments), gradients(expected, exact), rel=5e-4)


@pytest.mark.parametrize("loss", EACH_AND_ALL)
def test_saturated_logits(loss: Loss) -> None:
    """Differences of thousands: probabilities underflow, losses and gradients do not."""
    torch.manual_seed(3)
    draft = (torch.randn(6, 50) * 3000).requires_grad_()
    target, labels = torch.randn(6, 50) * 3000, torch.arange(6)
    value = divergence(draft, target, loss=loss, labels=labels).sum()
    (gradient,) = torch.autograd.grad(value, draft)
    exact = draft.detach().double().requires_grad_()
    expected = divergence(exact, target.double(), loss=loss, labels=labels).sum()
    (wanted,) = torch.autograd.grad(expected, exact)
    assert math.isfinite(expected.item())
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient.double(), wanted, atol=1e-3 * float(wanted.abs().max()) + 1e-30)


@pytest.mark.parametrize("loss", [*LOSSES, pytest.param(MIXTURE | {"rkl": 0.4}, id="mixture")])
def test_a_token_of_minus_infinity_on_both_sides_is_no_token(loss: Loss) -> None:
    torch.manual_seed(4)
    keep = torch.tensor([1, 2, 5, 6, 9])
    draft, target = torch.full((2, 4, 10), -torch.inf, dtype=torch.float64)
    draft[:, keep], target[:, keep] = torch.randn(2, 4, 5, dtype=torch.float64)
    few, all_of = draft[:, keep].requires_grad_(), draft.requires_grad_()
    for other in (target, keep_top_k(target, 2)):
        if isinstance(other, TargetTopK):
            less = other._replace(tokens=draft_columns(other.tokens, 5, keep))
        else:
            less = target[:, keep]
        labels = torch.tensor([1, 2, 5, 9])
        value = divergence(all_of, other, loss=loss, labels=labels).sum()
        expected = divergence(few, less, loss=loss, labels=draft_columns(labels, 5, keep)).sum()
        (gradient,) = torch.autograd.grad(value, all_of)
        (wanted,) = torch.autograd.grad(expected, few)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(gradient[:, keep], wanted, atol=1e-12)
        assert gradient.abs().sum() == pytest.approx(gradient[:, keep].abs().sum().item())


def test_infinite_divergences_are_infinite() -> None:
    one, other = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, -torch.inf, 1.0]])
    for name in ("fkl", "rkl"):
        assert divergence(one, other, loss=name).item() == torch.inf
    far = torch.tensor([[-torch.inf, -torch.inf, 1.0]])
    assert divergence(one, far, loss="lk_alpha").item() == torch.inf
    assert divergence(one, far, loss="tvd").item() == pytest.approx(1)
    assert divergence(one, far, loss="jsd").item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_weight_zero_are_left_out_whatever_they_hold(form: str) -> None:
    arguments = case(form)
    keep = torch.tensor([0, 1, 0, 1, 1, 0, 1]).bool()
    expected = plain(arguments, loss=MIXTURE)[keep].sum()
    wanted = gradients(expected, arguments)
    with torch.no_grad():
        arguments["hidden"][~keep] = torch.nan
        target = arguments["target"]
        held = {"logits": target, "top-k": target[1]}.get(form, target[0])
        held[~keep] = torch.nan
    for weights in (keep, keep.double()):
        got = fused_divergence(**arguments, loss=MIXTURE, weights=weights, chunk=2)
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
        assert_close(gradients(got, arguments), wanted)


@pytest.mark.parametrize("n", [0, N])
def test_no_row_that_counts(n: int) -> None:
    arguments = case(n=N)
    if n == 0:
        arguments["hidden"] = arguments["hidden"].detach()[:0].requires_grad_()
        arguments["target"], arguments["labels"] = arguments["target"][:0], arguments["labels"][:0]
    got = fused_divergence(**arguments, loss=MIXTURE, weights=torch.zeros(n))
    assert got.item() == 0
    assert all(g.abs().sum() == 0 for g in gradients(got, arguments))
    with torch.no_grad():
        assert fused_divergence(**arguments, loss="fkl", weights=torch.zeros(n)).item() == 0


def test_upstream_gradients_and_accumulation() -> None:
    arguments = case("states", n=12)
    whole = gradients(-2.5 * fused_divergence(**arguments, loss=MIXTURE), arguments)
    assert_close(whole, gradients(-2.5 * plain(arguments, loss=MIXTURE).sum(), arguments))
    for rows in (slice(0, 5), slice(5, 12)):
        target = arguments["target"]._replace(hidden=arguments["target"].hidden[rows])
        part = {**arguments, "hidden": arguments["hidden"][rows], "target": target}
        part["labels"] = arguments["labels"][rows]
        (-2.5 * fused_divergence(**part, loss=MIXTURE, chunk=4)).backward()
    assert_close([x.grad for x in leaves(arguments)], whole)


def test_only_the_gradients_that_are_wanted() -> None:
    arguments = case()
    arguments["hidden"] = arguments["hidden"].detach()
    head = arguments["head"]
    wanted = torch.autograd.grad(plain(arguments, loss="fkl").sum(), head.weight)
    value = fused_divergence(**arguments, loss="fkl")
    assert_close([*torch.autograd.grad(value, head.weight)], [*wanted])
    arguments["head"] = Head(head.weight.detach())
    assert not fused_divergence(**arguments, loss="fkl").requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_the_target(form: str) -> None:
    arguments = case(form)
    target = arguments["target"]
    parts = [target] if form == "logits" else [x for x in target if isinstance(x, Tensor)]
    parts = [x.requires_grad_() for x in parts if x.is_floating_point()]
    if form.startswith("states"):
        parts.append(target.head.weight.requires_grad_())
    assert parts
    fused_divergence(**arguments, loss=MIXTURE).backward()
    plain(arguments, loss=MIXTURE).sum().backward()
    assert all(x.grad is None for x in parts)


def test_under_autocast() -> None:
    arguments = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = fused_divergence(**arguments, loss=MIXTURE, chunk=3)
        expected = plain(arguments, loss=MIXTURE).sum()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    narrow = gradients(got, arguments)
    assert all(g.dtype == torch.float32 for g in narrow)
    assert_close(narrow, gradients(expected, arguments), rel=1e-2)


def test_the_head_gradient_of_many_chunks_is_summed_in_float32() -> None:
    """512 equal chunks of one row in bfloat16 would stop growing at 256."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    labels = torch.zeros(512, dtype=torch.int64)
    value = fused_divergence(hidden, Head(weight), None, loss="ce", labels=labels, chunk=1)
    value.backward()
    assert weight.grad.flatten().tolist() == [-256.0, 256.0]


@pytest.mark.parametrize("chunk", [6, 100])
def test_a_large_head_is_rounded_after_each_chunk(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the gradient of 64 chunks is as good as the rounding of its factors; of more, it
    is summed in float32."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape).bfloat16() for shape in ((384, 16), (300, 16)))
    labels = torch.randint(300, (384,))
    arguments: dict = {"loss": "ce", "labels": labels, "chunk": chunk}
    exact = weight.double().requires_grad_()
    fused_divergence(hidden.double(), Head(exact), None, **arguments).backward()
    assert exact.grad is not None
    errors = []
    for name, value in (
        ("MOST_CHUNKS", divergences.MOST_CHUNKS),
        ("CHUNK_BYTES", 0),
        ("MOST_CHUNKS", 3),
    ):
        monkeypatch.setattr(divergences, name, value)
        ours = weight.clone().requires_grad_()
        fused_divergence(hidden, Head(ours), None, **arguments).backward()
        assert ours.grad is not None
        errors.append(float((ours.grad.double() - exact.grad).norm() / exact.grad.norm()))
    summed, rounded, of_many = errors
    assert summed < 6e-3
    assert summed < rounded < 1e-2
    assert of_many == summed


def test_a_graph_that_is_kept_gives_its_gradients_again() -> None:
    """They are scaled in place where it is not."""
    arguments = case("states")
    value = 3 * fused_divergence(**arguments, loss=MIXTURE)
    first = torch.autograd.grad(value, leaves(arguments), retain_graph=True)
    second = torch.autograd.grad(value, leaves(arguments))
    assert_close([*first], gradients(3 * plain(arguments, loss=MIXTURE).sum(), arguments))
    assert_close([*first], [*second])


def test_a_chunk_holds_as_many_rows_as_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both sides' logits, in their dtypes and with what a head makes besides."""
    monkeypatch.setattr(divergences, "CHUNK_BYTES", 10_000_000)

    def rows(dtype: torch.dtype, top_k: bool = False, **of_head: float) -> int:
        hidden, weight = torch.zeros(9, 4, dtype=dtype), torch.zeros(5000, 4, dtype=dtype)
        target: TargetStates | TargetTopK = TargetStates(hidden, Head(weight))
        if top_k:
            target = keep_top_k(torch.zeros(9, 5000), 3)
        return divergences._rows_within(10_000_000, hidden, Head(weight, **of_head), target)

    assert rows(torch.float32) == 128  # 250 of 40,000 bytes, in whole tiles
    assert rows(torch.bfloat16) == 384
    assert rows(torch.bfloat16, top_k=True) == 256
    assert rows(torch.float32, softcap=30.0) == 125
    hidden = torch.zeros(9, 4)
    assert divergences._rows_within(10_000_000, hidden, Head(torch.zeros(3, 4)), None) == 1024
    assert divergences._rows_within(1, hidden, Head(torch.zeros(3, 4)), None) == 1


# The forms of the target.


def test_a_stored_logsumexp_spares_the_target_tokens_the_draft_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, widths, logits = case("states+lse", vocab=TRIMMED), [], Head.logits

    def counted(self: Head, hidden: Tensor) -> Tensor:
        widths.append(len(self.weight))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counted)
    fused_divergence(**arguments, loss="fkl")
    assert widths == [len(TRIMMED)] * 2


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("lk_hybrid", "ce")])
def test_lumping_the_tail_bounds_the_loss_from_below(name: str) -> None:
    exact = plain(case(n=50), loss=name).detach()
    previous = torch.zeros(50, dtype=torch.float64)
    for k in (1, 4, 12, V - 1):
        arguments = case(n=50)
        arguments["target"] = keep_top_k(arguments["target"], k)
        lumped = plain(arguments, loss=name).detach()
        assert (lumped <= exact + 1e-12).all()
        assert (lumped >= previous - 1e-12).all()
        previous = lumped
    assert torch.allclose(previous, exact)  # a tail of one token is no lump
    assert not torch.allclose(plain(case("top-k", n=50), loss=name).detach(), exact, rtol=1e-3)


def test_keep_top_k() -> None:
    logits = torch.tensor([[5.0, 60.0, -40.0, 2.0]])
    top = keep_top_k(logits, 2, temperature=2.0)
    assert top.tokens.tolist() == [[1, 0]]
    log_p = torch.log_softmax(logits.double() / 2, -1)[0]
    assert top.log_probs[0].tolist() == pytest.approx(log_p[[1, 0]].tolist(), abs=1e-9)
    assert top.log_tail.item() == pytest.approx(log_p[[2, 3]].logsumexp(0).item())
    assert top.temperature == 2.0


def test_draft_columns() -> None:
    tokens = torch.tensor([[0, 7], [-100, 21], [22, 11]])
    assert draft_columns(tokens, V).tolist() == [[0, 7], [-1, 21], [22, 11]]
    assert draft_columns(tokens, 20).tolist() == [[0, 7], [-1, -1], [-1, 11]]
    assert draft_columns(tokens, len(TRIMMED), TRIMMED).tolist() == [[3, 4], [-1, -1], [5, 0]]


# What it costs, and what it refuses.


def peak(call: Callable[[], object]) -> int:
    """Bytes held at most during the call beyond those held before it, as the allocator counts."""
    with profile(profile_memory=True) as record:
        call()
    held = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", ["fkl", "lk_hybrid"])
def test_peak_memory_grows_with_the_chunk_and_not_with_the_tokens(name: str) -> None:
    v, d = 4096, 4
    weight = torch.randn(v, d, requires_grad=True)
    target_head = Head(torch.randn(v, d))

    def of(n: int, chunk: int) -> int:
        hidden, states = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
        return peak(
            lambda: fused_divergence(
                hidden, Head(weight), TargetStates(states, target_head), loss=name, chunk=chunk
            ).backward()
        )

    logits = 4 * v  # bytes of one row
    small, large, many = of(256, 16), of(256, 32), of(1024, 16)
    fixed = 3 * weight.numel() * 4  # its gradient, scaled and summed
    assert small > 3 * 16 * logits  # the counter counts
    assert small < 20 * 16 * logits + fixed
    assert large - small == pytest.approx(small - fixed, rel=0.35)
    assert many - small < 16 * logits  # hidden states and their gradients only
    everything = peak(
        lambda: (
            divergence(Head(weight).logits(torch.randn(1024, d)), torch.randn(1024, v), loss=name)
            .sum()
            .backward()
        )
    )
    assert everything > 20 * many


def test_nothing_loads_triton_until_it_is_asked_for() -> None:
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from specdistill_kernels import Head, fused_divergence\n"
        "head = Head(torch.randn(9, 4, requires_grad=True))\n"
        "fused_divergence(\n"
        "    torch.randn(3, 4), head, torch.randn(3, 9), loss='fkl').backward()\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert 'specdistill_kernels.divergences.triton_backend' not in sys.modules\n"
        "assert 'transformers' not in sys.modules\n"
    )
    path = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_triton_backend_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = case(dtype=torch.float32)
    installed: dict[str, object] = {"triton": object()}
    monkeypatch.setattr(divergences.importlib.util, "find_spec", installed.get)
    with pytest.raises(RuntimeError, match="on cpu"):
        fused_divergence(**arguments, loss="fkl", backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="float64"):
        fused_divergence(**case(), loss="fkl", backend="triton")
    with pytest.raises(RuntimeError, match="it has no skew_kl"):
        fused_divergence(**arguments, loss={"fkl": 1.0, "skew_kl": 1.0}, backend="triton")
    installed.clear()
    with pytest.raises(RuntimeError, match="not installed"):
        fused_divergence(**arguments, loss="fkl", backend="triton")
    automatic = fused_divergence(**arguments, loss="fkl", backend="auto")
    assert automatic == fused_divergence(**arguments, loss="fkl", backend="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"loss": {}}, "empty"),
        ({"loss": {"fkl": 0.0}}, "weight of loss 'fkl'"),
        ({"loss": {"fkl": math.nan}}, "weight of loss 'fkl'"),
        ({"beta": 0.5}, "beta belongs"),
        ({"eta": 3.0}, "eta belongs"),
        ({"skew": 0.1}, "skew belongs"),
        ({"loss": "skew_kl", "skew": 1.0}, "skew between"),
        ({"loss": "jsd", "beta": 1.5}, "beta must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"target": None}, "only the loss 'ce'"),
        ({"loss": "ce", "labels": None}, "labels must be"),
        ({"loss": "ce", "labels": torch.zeros(3, dtype=torch.int64)}, "labels must be"),
        ({"weights": torch.ones(3)}, "weights must be"),
        ({"chunk": 0}, "chunk must be"),
        ({"backend": "cuda"}, "does not exist"),
        ({"hidden": torch.randn(N, D + 1)}, "hidden must be"),
        ({"target": torch.randn(N + 1, V)}, "rows"),
        ({"target": torch.randn(N, V + 1)}, "draft_vocab"),
        ({"draft_vocab": TRIMMED}, "draft_vocab must be"),
        ({"target": keep_top_k(torch.randn(N, V), 3, temperature=2.0)}, "temperature 2.0"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_divergence(**{**case(), "loss": "fkl", **change})


def test_a_stored_logsumexp_of_another_temperature_is_refused() -> None:
    arguments = case("states+lse", vocab=TRIMMED, temperature=2.0)
    with pytest.raises(ValueError, match="belongs to temperature 2"):
        fused_divergence(**{**arguments, "temperature": 1.0}, loss="fkl")


def test_a_head_cut_beforehand_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case("states+lse", vocab=TRIMMED)
    target = arguments["target"]
    cut = target._replace(head=target.head.of(arguments["draft_vocab"]), cut=True)
    expected = fused_divergence(**arguments, loss="fkl")
    monkeypatch.setattr(Head, "of", None)  # nothing is gathered again
    assert torch.equal(fused_divergence(**{**arguments, "target": cut}, loss="fkl"), expected)
    for wrong in ({"target": cut._replace(logsumexp=None)}, {"target": target._replace(cut=True)}):
        with pytest.raises(ValueError, match="head is cut"):
            fused_divergence(**{**arguments, **wrong}, loss="fkl")


def test_float16_keeps_the_gradients_of_a_wide_vocabulary() -> None:
    """Each of 60,000 tokens has a gradient too small for float16, and together they are most of
    what the states get.
    """
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16).half(), (torch.randn(60_000, 16) / 4).half()
    known = keep_top_k(2.5 * torch.randn(4, 60_000), 20)
    ours = hidden.clone().requires_grad_()
    fused_divergence(ours, Head(weight), known, loss="rkl").backward()
    exact = hidden.double().requires_grad_()
    divergence(Head(weight.double()).logits(exact), known, loss="rkl").sum().backward()
    assert ours.grad is not None
    assert exact.grad is not None
    assert (ours.grad - exact.grad).norm() <= 5e-3 * exact.grad.norm()


@pytest.mark.parametrize("loss", ["tvd", "fkl", "lk_alpha"])
def test_a_tail_without_a_token_of_the_draft_counts_as_missing(loss: str) -> None:
    """The draft has three tokens, all among the four that are known of p: what p gives to others
    lies on no token of the draft.
    """
    p, rest = torch.tensor([0.4, 0.2, 0.1, 0.1], dtype=torch.float64), 0.2
    known = TargetTopK(
        torch.tensor([[5, 2, 9, 7]]), p.log()[None], torch.tensor([rest], dtype=torch.float64).log()
    )
    logits = torch.tensor([[0.3, -0.4, 1.1]], dtype=torch.float64)
    q = logits[0].softmax(-1)
    mine = torch.stack([p[1], p[0], p[3]])  # of the tokens 2, 5 and 7
    alpha, mass = torch.minimum(mine, q).sum(), mine.sum()
    wanted = {
        "tvd": 1 - alpha,
        "fkl": (mine * (mine / q).log()).sum() - mass * mass.log(),
        "lk_alpha": -alpha.log(),
    }
    got = divergence(logits, known, loss=loss, draft_vocab=torch.tensor([2, 5, 7]))
    assert got.item() == pytest.approx(wanted[loss].item(), rel=1e-9)


@pytest.mark.parametrize("loss", ["fkl", "rkl", "tvd", "lk_alpha"])
def test_a_draft_close_to_the_kept_tokens_and_their_tail_loses_no_digits(loss: str) -> None:
    """Nearly all of both sides may lie in the tail, where the sums over tokens are rounded."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 4099, generator=generator)
    draft = target + 0.3 * torch.randn(64, 4099, generator=generator)
    top = keep_top_k(target, 20)
    wide = TargetTopK(top.tokens, top.log_probs.double(), top.log_tail.double())
    exact = divergence(draft.double(), wide, loss=loss)
    error = (divergence(draft, top, loss=loss) - exact).abs() / exact
    assert error.max() < {"fkl": 2e-4, "rkl": 2e-4, "tvd": 6e-5, "lk_alpha": 6e-5}[loss]
