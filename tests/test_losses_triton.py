"""The Triton row kernels under Triton's interpreter, against the plain definitions.

    TRITON_INTERPRET=1 python -m pytest tests/test_losses_triton.py

The variable must be set before triton is imported, so these tests have a process of their own.
"""

import itertools
import math
import os
from typing import Any

import pytest
import torch
from dispatch import PeakBytes
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1, before Python starts", allow_module_level=True)

from specdistill_kernels import divergences
from specdistill_kernels.divergences import divergence, fused_divergence, reference, triton_backend
from specdistill_kernels.divergences.reference import LOSSES as ALL
from specdistill_kernels.divergences.reference import Dense, Lumped, Mixture, mixture
from specdistill_kernels.divergences.targets import Head, TargetStates, keep_top_k
from specdistill_kernels.tiles import Tile, Tiles

# numpy says so of every -inf that the kernel masks.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LOSSES = [name for name in ALL if name not in divergences.TRITON_LACKS]
MIXTURES = {
    "all": dict.fromkeys(LOSSES, 0.5),
    "fkl+ce": {"fkl": 0.9, "ce": 0.1},
    "jsd+tvd": {"jsd": 0.4, "tvd": 2.0},
    "overlaps": {"tvd": 0.5, "lk_alpha": 1.5, "lk_hybrid": 0.3, "ce": 0.2},
}
OBJECTIVES = {**{name: {name: 1.0} for name in LOSSES}, **MIXTURES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates where it stores bfloat16, a GPU rounds to nearest: one unit either way.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def rows(
    form: str = "whole",
    *,
    n: int = 5,
    width: int = 77,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    scale: float = 2.0,
) -> dict[str, Any]:
    """Arguments of `row_gradients` but the mixture. form: the whole target; trimmed, with the
    logsumexp of more tokens; or top-k, two of whose tokens the draft lacks in the second row.
    """
    torch.manual_seed(n * width)
    draft = torch.randn(n, width).mul(scale).to(dtype)
    logits = torch.randn(n, width).mul(scale).to(target_dtype or dtype)
    target: Dense | Lumped = Dense(logits, None)
    if form == "trimmed":
        more = torch.cat([logits.float(), torch.randn(n, 9) * scale], 1)
        target = Dense(logits, (more / temperature).logsumexp(-1))
    if form == "top-k":
        tokens, log_probs, log_tail, _ = keep_top_k(logits, 6, temperature=temperature)
        tokens[1, [0, 4]] = -1
        target = Lumped(tokens, log_probs, log_tail)
    labels = torch.randint(width, (n,))
    labels[n // 2] = -1
    weights = torch.rand(n) + 0.1
    return {
        "draft_logits": draft,
        "target": target,
        "labels": labels,
        "weights": weights,
        "temperature": temperature,
    }


def poisoned(values: Tensor) -> Tensor:
    """A copy in the middle of NaN, which a kernel that strays would read or overwrite."""
    n, width = values.shape
    room = torch.full(((n + 2) * width,), torch.nan, dtype=values.dtype)
    inside = room[width : (n + 1) * width].view(n, width)
    inside.copy_(values)
    return inside


def exactly(case: dict[str, Any], labels: Tensor | None, parts: Mixture) -> tuple[Tensor, Tensor]:
    """What the definition says, in float64."""
    target = type(case["target"])(
        *(x.double() if x is not None and x.is_floating_point() else x for x in case["target"])
    )
    arguments = (target, labels, case["weights"], parts, case["temperature"])
    return reference.row_gradients(case["draft_logits"].double(), *arguments)


def check(
    case: dict[str, Any], objective: dict[str, float], block: int = 0, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel against definition, in losses and gradients; returns the kernel's."""
    tile = Tile(block, 4) if block else None
    parts = mixture(objective)
    labels = case["labels"] if "ce" in objective else None
    arguments = (case["target"], labels, case["weights"], parts, case["temperature"])
    draft = poisoned(case["draft_logits"])
    held = draft.untyped_storage()
    got, gradient = triton_backend.row_gradients(draft, *arguments, tile=tile, rows=rows)
    expected, wanted = exactly(case, labels, parts)
    assert gradient.data_ptr() == draft.data_ptr()
    around = torch.empty(0, dtype=draft.dtype).set_(held)
    width = draft.shape[1]
    assert around[:width].isnan().all()
    assert around[-width:].isnan().all()
    assert torch.allclose(got.double(), expected, rtol=2e-5, atol=2e-6)
    error = (gradient.double() - wanted).abs().amax(-1)
    assert (error <= ROUNDING[draft.dtype] * wanted.abs().amax(-1).clamp(min=0.01)).all(), error
    return got, gradient


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("form", ["whole", "trimmed", "top-k"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients(name: str, form: str, temperature: float) -> None:
    check(rows(form, temperature=temperature), OBJECTIVES[name])


@pytest.mark.parametrize("form", ["whole", "trimmed", "top-k"])
@pytest.mark.parametrize(("dtype", "target_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_dtypes(dtype: torch.dtype, target_dtype: torch.dtype, form: str) -> None:
    for name in ("all", "fkl", "lk_hybrid"):
        check(rows(form, dtype=dtype, target_dtype=target_dtype, width=131), OBJECTIVES[name])


@pytest.mark.parametrize("width", [2, 15, 16, 17, 255, 256, 1000, 4099])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_shapes(n: int, width: int) -> None:
    for form in ("whole", "trimmed"):
        check(rows(form, n=n, width=width), OBJECTIVES["all"])


@pytest.mark.parametrize("form", ["whole", "trimmed", "top-k"])
def test_independent_of_block_and_rows_per_program(form: str) -> None:
    case = rows(form, n=5, width=150)
    first, by_first = check(case, OBJECTIVES["all"], block=256, rows=1)
    for block, per_program in ((16, 8), (64, 2), (128, 4)):
        got, gradient = check(case, OBJECTIVES["all"], block=block, rows=per_program)
        assert torch.allclose(got, first, rtol=1e-5)
        assert torch.allclose(gradient, by_first, rtol=1e-4, atol=1e-6)


def test_strides() -> None:
    """Of a target whose rows are longer than what is read of them, aligned or not."""
    for gap in (1, 16):
        case = rows(width=64)
        wide = torch.full((5, 64 + gap), torch.nan)
        wide[:, :64] = case["target"].logits
        case["target"] = Dense(wide[:, :64], None)
        check(case, OBJECTIVES["all"])


def test_alignment() -> None:
    aligned = torch.zeros(4, 64)
    assert triton_backend._unit(aligned) == 16
    for other in (aligned[:, :48], aligned[1:]):
        assert triton_backend._unit(aligned, other) == 16
    odd = (torch.zeros(4, 63), torch.zeros(4, 65)[:, :64], torch.zeros(257)[1:].view(4, 64))
    for other in odd:
        assert triton_backend._unit(aligned, other) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("form", ["whole", "top-k"])
def test_saturated_logits(form: str, name: str) -> None:
    case = rows(form, n=6, width=50, scale=3000.0)
    parts = mixture(OBJECTIVES[name])
    labels = case["labels"] if "ce" in parts.weights else None
    expected, wanted = exactly(case, labels, parts)
    got, gradient = triton_backend.row_gradients(
        case["draft_logits"], case["target"], labels, case["weights"], parts, 1.0
    )
    assert torch.allclose(got.double(), expected, rtol=1e-5)
    assert torch.allclose(gradient.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("rkl", "jeffreys")])
def test_minus_infinity(name: str) -> None:
    """A whole first block of it on both sides, more of it on the target's, and lone tokens."""
    case = rows(n=4, width=96)
    draft, target = case["draft_logits"], case["target"].logits
    draft[:, :32] = target[:, :32] = -torch.inf
    draft[:, 40] = target[:, 40] = -torch.inf
    if "rkl" not in OBJECTIVES[name]:
        target[:2, 32:64] = -torch.inf
    case["labels"] = torch.tensor([70, 71, -1, 72])
    _, gradient = check(case, OBJECTIVES[name], block=32, rows=2)
    assert (gradient[:, :32] == 0).all()
    top = keep_top_k(target, 5)
    case["target"] = Lumped(top.tokens, top.log_probs, top.log_tail)
    check(case, OBJECTIVES[name], block=32, rows=2)


@pytest.mark.parametrize("places", [[4, 5], [6, 7]], ids=["overlapping", "apart"])
def test_infinite_divergences_are_infinite_and_no_others(places: list[int]) -> None:
    """A weight of 0 must not turn another loss's infinity into NaN."""
    draft, target = torch.full((2, 1, 20), -torch.inf)
    draft[0, [3, 4]] = 0.0
    target[0, places] = 0.0
    for name in OBJECTIVES:
        parts = mixture(OBJECTIVES[name])
        labels = torch.tensor([3]) if "ce" in OBJECTIVES[name] else None
        arguments = (Dense(target, None), labels, torch.ones(1), parts, 1.0)
        expected, wanted = reference.row_gradients(draft, *arguments)
        got, gradient = triton_backend.row_gradients(draft.clone(), *arguments)
        assert got.item() == pytest.approx(expected.item(), rel=1e-6), name
        infinite = {"fkl", "rkl", "jeffreys", "lk_hybrid"} | (
            {"lk_alpha"} if 6 in places else set()
        )
        assert math.isinf(expected.item()) is bool(infinite & set(parts.weights)), name
        if expected.isfinite():
            assert torch.allclose(gradient, wanted, atol=1e-6), name


def test_the_tail_is_missing_where_the_draft_has_no_token_outside_the_k() -> None:
    case = rows(n=3, width=4)
    columns = torch.tensor([[0, 1, 2, 3], [3, -1, 0, 1], [-1, -1, -1, -1]])
    log_p = torch.tensor([0.4, 0.3, 0.15, 0.1]).log().expand(3, 4)
    case["target"] = Lumped(columns, log_p, torch.tensor([0.05, 0.05, 0.05]).log())
    case["weights"] = torch.ones(3)
    for name in ("fkl", "jsd", "tvd", "lk_alpha", "lk_hybrid"):
        got, _ = check(case, OBJECTIVES[name])
        if name == "tvd":  # all of p is on what the draft lacks, or on the lump
            assert got[2].item() == pytest.approx(1 - 0.05)


def test_equal_logits_have_no_gradient() -> None:
    case = rows(width=200)
    case["target"] = Dense(case["draft_logits"].clone(), None)
    for name in ("fkl", "rkl", "jsd", "tvd", "lk_alpha", "lk_hybrid"):
        _, gradient = check(case, OBJECTIVES[name])
        assert gradient.abs().max() < 1e-6


def test_a_vocabulary_of_151936() -> None:
    for dtype, objective in ((torch.bfloat16, "all"), (torch.float32, "fkl")):
        case = rows("trimmed", n=2, width=151_936, dtype=dtype, scale=3.0)
        case["labels"] = torch.tensor([151_935, 3])
        check(case, OBJECTIVES[objective])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logsumexp(dtype: torch.dtype) -> None:
    for width, block, per_program in ((1, 16, 1), (77, 16, 4), (4099, None, None)):
        logits = torch.randn(5, width + 3).mul(30).to(dtype)[:, :width]
        logits[1, :-1] = -torch.inf
        tile = Tile(block, 4) if block else None
        got = triton_backend.logsumexp(logits, 0.7, tile=tile, rows=per_program)
        assert torch.allclose(got, reference.logsumexp(logits, 0.7), rtol=1e-6)


@pytest.mark.parametrize("vocab", [None, [11, 2, 19, 0, 7, 22, 3, 16]])
@pytest.mark.parametrize("form", ["logits", "states", "states+lse", "top-k"])
def test_fused_divergence_is_the_same_with_both_backends(
    form: str, vocab: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    keep = None if vocab is None else torch.tensor(vocab)
    n, v, width = 9, 23, 23 if vocab is None else len(vocab)
    hidden, states = torch.randn(n, 5, requires_grad=True), torch.randn(n, 6)
    weight, bias = torch.randn(width, 5, requires_grad=True), torch.randn(width, requires_grad=True)
    head, target_head = Head(weight, bias, softcap=5.0), Head(torch.randn(v, 6))
    logits = target_head.logits(states)
    target = {
        "logits": logits,
        "states": TargetStates(states, target_head),
        "states+lse": TargetStates(states, target_head, (logits / 1.3).logsumexp(-1), 1.3),
        "top-k": keep_top_k(logits, 4, temperature=1.3),
    }[form]
    weights = torch.rand(n) * (torch.arange(n) % 3 > 0)
    results, calls, kernel = [], [], triton_backend.row_gradients

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        return kernel(*arguments)

    monkeypatch.setattr(triton_backend, "row_gradients", counted)
    for backend in ("torch", "triton"):
        options: dict[str, Any] = {
            "loss": MIXTURES["all"],
            "temperature": 1.3,
            "labels": torch.arange(n),
            "draft_vocab": keep,
            "weights": weights,
            "chunk": 4,
            "backend": backend,
        }
        value = fused_divergence(hidden, head, target, **options)
        found = torch.autograd.grad(-2.0 * value, [hidden, weight, bias])
        with torch.no_grad():
            quiet = fused_divergence(hidden, head, target, **options)
        results.append((value, quiet, *found))
    assert calls == [4, 2] * 2  # 6 rows count, once with and once without gradients
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_cross_entropy_needs_no_target() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 3), torch.randn(40, 3, requires_grad=True)
    labels = torch.tensor([0, 39, -100, 7, 7])
    logits = (hidden @ weight.T).double()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    value = fused_divergence(
        hidden, Head(weight), None, loss="ce", labels=labels, temperature=3.0, backend="triton"
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    (got,) = torch.autograd.grad(value, weight)
    (wanted,) = torch.autograd.grad(expected, weight)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_label_is_read_before_any_thread_writes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has one thread: what keeps many of them apart is a barrier."""
    from triton.runtime.interpreter import interpreter_builder

    case, events = rows(n=1, width=40), []
    draft = case["draft_logits"]
    load, store = interpreter_builder.create_load, interpreter_builder.create_masked_store

    def of_draft(pointers: Any) -> bool:
        at = pointers.data.astype(int) - draft.data_ptr()
        return bool(((at >= 0) & (at < draft.nbytes)).any())

    def loaded(pointers: Any, *more: Any) -> Any:
        events.extend(["label"] * of_draft(pointers))
        return load(pointers, *more)

    def stored(pointers: Any, *more: Any) -> Any:
        events.extend(["gradient"] * of_draft(pointers))
        return store(pointers, *more)

    monkeypatch.setattr(interpreter_builder, "create_load", loaded)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", stored)
    monkeypatch.setattr(interpreter_builder, "create_barrier", lambda: events.append("barrier"))
    labels, parts = torch.tensor([3]), mixture({"fkl": 0.5, "ce": 0.5})
    arguments = (case["target"], labels, case["weights"], parts, 1.0)
    triton_backend.row_gradients(draft, *arguments, tile=Tile(16, 4))
    assert events == ["label", "barrier"] + ["gradient"] * 3


@pytest.mark.parametrize("loss", ["rkl", "jeffreys", "jsd", "tvd", "lk_alpha"])
def test_gradients_do_not_cancel_where_nearly_all_lies_in_the_tail(loss: str) -> None:
    """20 of 60,000 tokens are known of p, and q has but a ten-thousandth there: what is left of the
    tail's gradients is that small a part of their terms.
    """
    torch.manual_seed(0)
    logits = torch.randn(2, 60_000)
    known = keep_top_k(2.5 * torch.randn(2, 60_000), 20)
    exact = logits.double().requires_grad_()
    expected = divergence(exact, known, loss=loss)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    target = Lumped(known.tokens, known.log_probs, known.log_tail)
    losses_, got = triton_backend.row_gradients(
        logits.clone(), target, None, torch.ones(2), mixture(loss), 1.0
    )
    assert torch.allclose(losses_.double(), expected.detach(), rtol=1e-5)
    assert (got - wanted).norm() <= 2e-5 * wanted.norm()
    outside = torch.ones_like(got, dtype=torch.bool).scatter_(1, known.tokens, False)
    assert (got - wanted)[outside].norm() <= 1e-4 * wanted[outside].norm()


class Nothing:
    """A kernel that is not run."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("half", DTYPES[1:], ids=str)
@pytest.mark.parametrize("loss", ["fkl", "jsd", "ce"])
def test_peak_memory_at_4096_rows_of_151936_tokens(
    loss: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on tensors that hold nothing: the gradients of states and head, and one chunk's
    logits of draft and target; below the 0.92 GiB of Liger-Kernel's fused divergence."""
    monkeypatch.setattr(triton_backend, "divergence_kernel", Nothing())
    monkeypatch.setattr(divergences, "_kernel", lambda *_: triton_backend)
    rows, width, vocab = 4096, 2048, 151_936
    hidden, weight, states, other = (
        torch.empty(n, width, dtype=half, device="meta") for n in (rows, vocab) * 2
    )
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    target = TargetStates(states, Head(other))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with PeakBytes() as counted:
        fused_divergence(hidden, Head(weight), target, loss=loss, labels=labels).backward()
    gradients = sum(leaf.nbytes for leaf in leaves)
    assert counted.peak < 0.92 * 2**30
    if half == torch.bfloat16:
        chunk = 512 * vocab * half.itemsize * (1 if loss == "ce" else 2)
        few = 512 * width * half.itemsize + 100 * rows  # a chunk's part of a gradient, and numbers
        assert gradients + chunk < counted.peak < gradients + max(chunk, 2 * chunk) + few


@pytest.mark.parametrize("loss", ["rkl", "jsd", "tvd", "lk_alpha"])
def test_float16_keeps_the_gradients_of_lumped_tokens(loss: str) -> None:
    """Each of 60,000 is too small for float16, and together they are most of what states get."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16).half(), (torch.randn(60_000, 16) / 4).half()
    known = keep_top_k(2.5 * torch.randn(4, 60_000), 20)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    value = fused_divergence(ours[0], Head(ours[1]), known, loss=loss, backend="triton")
    (1024 * value).backward()  # as a loss scale would: what is lost before it stays lost
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    divergence(Head(exact[1]).logits(exact[0]), known, loss=loss).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad.double() / 1024 - b.grad).norm() <= 5e-3 * b.grad.norm()


@pytest.mark.parametrize("upstream", [1e-6, 1e-2, 1e2])
def test_a_large_float16_head_has_an_exponent_for_each_token(
    upstream: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over chunks that float16 could not hold side by side, before a factor decides which of
    them it must."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, 16).half(), torch.randn(600, 16).div(2).half()
    rare = torch.where(torch.arange(600) < 300, -16.0, 0.0)
    target = torch.randn(24, 600).mul(3) + rare
    weights = torch.logspace(-3, 6, 24)

    def gradient() -> Tensor:
        leaf = weight.clone().requires_grad_()
        head = Head(leaf, rare.half())
        options = {"loss": "fkl", "weights": weights, "backend": "triton", "chunk": 5}
        (upstream * fused_divergence(hidden, head, target, **options)).backward()
        assert leaf.grad is not None
        return leaf.grad.double()

    expected = gradient()  # summed in float32
    monkeypatch.setattr(divergences, "CHUNK_BYTES", 1)
    monkeypatch.setattr(divergences, "PART_BYTES", 512)
    got, most = gradient(), expected.abs().amax(1, keepdim=True)
    whole = most.isfinite()[:, 0]
    assert (most[whole] > 0).sum() > 250
    assert ((got - expected).abs() <= 4e-3 * most + 2**-24)[whole].all()
    assert (got[expected.isinf()].abs() > 6e4).all()


def test_automatic_is_torch_on_a_cpu() -> None:
    parts = mixture("fkl")
    assert divergences._kernel("auto", torch.zeros(1), parts) is reference
    assert divergences._kernel("triton", torch.zeros(1), parts) is triton_backend


def test_every_launch_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels are launched with here, in the form in which it is compiled for a GPU, also
    where a device class has tiles of its own."""
    forms = ("plain", "sums", "tight", "tightest")
    sizes = (Tile(2048, 16), Tile(256, 2), Tile(128, 2), Tile(64, 2))
    other = Tiles(**dict(zip(forms, sizes, strict=True)))
    monkeypatch.setattr(triton_backend, "TILES", {"": Tiles(), "sm_90": other})
    found = triton_backend.configurations()
    listed = {
        (
            c.kernel.fn.__name__,
            *sorted((k, v) for k, v in c.constexprs.items() if v is not None),
            c.num_warps,
        )
        for c in found
    }
    assert len(listed) == 2 * 2 * (2 * 2 * 2 + 1)
    dtypes = {
        (c.signature["draft"], c.signature["target"], c.constexprs["LUMPED"])
        for c in found
        if "draft" in c.signature
    }
    assert len(dtypes) == 6
    monkeypatch.setattr(
        triton_backend,
        "_constants",
        lambda num, width, tile, rows, chosen: {
            "BLOCK": chosen.block,
            "ROWS": 1,
            "num_warps": chosen.warps,
        },
    )
    seen = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
                seen.append((self.kernel.fn.__name__, *sorted(constants.items()), num_warps))
                if len(arguments) > 6:
                    kinds = dict(zip(DTYPES, ("*fp32", "*bf16", "*fp16"), strict=True))
                    pair = tuple(kinds[x.dtype] for x in arguments[:2])
                    assert (*pair, constants["LUMPED"]) in dtypes
                self.kernel[grid](*arguments, num_warps=num_warps, **constants)

            return launch

    for name in ("divergence_kernel", "logsumexp_kernel"):
        monkeypatch.setattr(triton_backend, name, Recorder(getattr(triton_backend, name)))
    cases = itertools.product(("whole", "top-k"), (32, 33), DTYPES, ("", "sm_90"))
    for shape, width, dtype, device in cases:
        monkeypatch.setattr(
            triton_backend, "tiles_for", lambda _, d=device: triton_backend.TILES[d]
        )
        triton_backend.logsumexp(torch.zeros(1, width, dtype=dtype), 1.0)
        if dtype == torch.float16:  # the draft's logits never are
            continue
        for name in ("fkl", "tvd", "all", "fkl+ce"):
            case = rows(shape, n=2, width=width, dtype=dtype, target_dtype=torch.bfloat16)
            check(case, OBJECTIVES[name])
    assert set(seen) == listed
