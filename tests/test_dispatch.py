"""Which backend runs, and what is said where one cannot."""

import os
import subprocess
import sys

import pytest
import torch

from specdistill_kernels import (
    RowSettings,
    counter_noise,
    divergences,
    sample,
    verification,
    verify,
)
from specdistill_kernels.divergences import reference
from specdistill_kernels.divergences.reference import mixture
from specdistill_kernels.verification import _takes_triton


class OnGpu:
    """A tensor's outside, as far as the choice of a backend looks at it."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, stride: int = 1) -> None:
        self.dtype, self.last_stride = dtype, stride
        self.device = torch.device("cuda")

    def stride(self, dim: int) -> int:
        assert dim == -1
        return self.last_stride


def other_noise(*arguments: torch.Tensor) -> torch.Tensor:
    return counter_noise(*arguments)


CANNOT = {
    "float64": ([OnGpu(torch.float64)], counter_noise, "torch.float64; cast them"),
    "two dtypes": (
        [OnGpu(torch.float32), OnGpu()],
        counter_noise,
        "torch.bfloat16 and torch.float32; cast them",
    ),
    "columns": ([OnGpu(stride=2)], counter_noise, "side by side; call .contiguous()"),
    "noise": ([OnGpu()], other_noise, "leave `noise` alone"),
}


@pytest.fixture
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("_with_triton")
def test_auto_takes_triton_on_a_gpu_and_the_reference_elsewhere() -> None:
    assert _takes_triton("auto", counter_noise, OnGpu(), OnGpu())
    assert _takes_triton("auto", counter_noise, OnGpu(), None)
    assert not _takes_triton("reference", counter_noise, OnGpu())
    assert not _takes_triton("auto", counter_noise, torch.zeros(1))


@pytest.mark.usefixtures("_with_triton")
@pytest.mark.parametrize("case", CANNOT.values(), ids=CANNOT)
def test_what_triton_cannot_take_goes_to_the_reference_or_is_refused(case: tuple) -> None:
    logits, noise, message = case
    verification.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="verifying run in PyTorch, many times slower") as said:
        assert not any(_takes_triton("auto", noise, *logits) for _ in range(3))
    assert len(said) == 1
    assert message in str(said[0].message)
    with pytest.raises(ValueError, match=r"Triton backend cannot run.*or choose 'reference'") as e:
        _takes_triton("triton", noise, *logits)
    assert message in str(e.value)


@pytest.mark.usefixtures("_with_triton")
def test_a_loss_that_triton_lacks_is_taken_in_torch_with_a_warning_once() -> None:
    parts = mixture("skew_kl")
    verification.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="it has no skew_kl") as said:
        kernels = [divergences._kernel("auto", OnGpu(), parts) for _ in range(3)]
    assert kernels == [reference] * 3
    assert len(said) == 1


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "find_spec", lambda name: None)
    verification.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert not _takes_triton("auto", counter_noise, OnGpu())
    with pytest.raises(ValueError, match="triton is not installed; pip install triton"):
        _takes_triton("triton", counter_noise, OnGpu())


def test_logits_in_the_cpus_memory_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"logits are on cpu; move them to a GPU, set TRITON_INT"):
        _takes_triton("triton", counter_noise, torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _takes_triton("triton", counter_noise, torch.zeros(1))
    assert not _takes_triton("auto", counter_noise, torch.zeros(1))


def test_a_backend_that_does_not_exist() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    rows = RowSettings(torch.ones(1), zero, zero)
    with pytest.raises(ValueError, match="'cuda' does not exist; choose 'auto', 'triton' or"):
        sample(torch.zeros(1, 4), rows, position=0, backend="cuda")
    lengths, tokens = torch.ones(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        verify(tokens, None, torch.zeros(1, 2, 4), rows, lengths=lengths, backend="cuda")


def test_the_cpu_never_loads_triton() -> None:
    script = (
        "import sys, torch, specdistill_kernels as k\n"
        "one = torch.zeros(1, dtype=torch.int64)\n"
        "k.sample(torch.zeros(1, 4), k.RowSettings(torch.ones(1), one, one), position=0)\n"
        "raise SystemExit('triton' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
